"""What can be typed: the commands, their options, and what their help says."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn

from aiockpt._version import __version__
from aiockpt.cli import completion
from aiockpt.format.names import MAX_STEP

__all__ = ["TROUBLE", "make_parser"]

TROUBLE = 2
"""Exit status where a command could not do its work."""

_EXIT_STATUS = "exit status: 0 done; 1 a finding (a bad checkpoint); 2 the command could not do its work; 130 Ctrl-C"

_SIZE = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,6})?) ?([KMGT]i?B|B|)", re.ASCII | re.IGNORECASE)
_UNITS = {"": 1, "B": 1} | {
    f"{letter}{middle}B": base**power
    for power, letter in enumerate("KMGT", 1)
    for middle, base in (("", 1000), ("I", 1024))
}


class _Help(argparse.HelpFormatter):
    """Leaves out the line above the list of commands that has nothing but their metavar."""

    def _format_action(self, action: argparse.Action) -> str:
        text = super()._format_action(action)
        return text.partition("\n")[2] if isinstance(action, argparse._SubParsersAction) else text


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        """Print the line and exit."""
        self.exit(TROUBLE, f"{self.prog}: {message} (see {self.prog} --help)\n")


Commands = argparse._SubParsersAction  # argparse has no public name for what add_subparsers returns


def make_parser() -> Parser:
    """Return the parser of the whole command line."""
    parser = Parser(
        prog="aiockpt",
        description="Look at, compare, check, remove, export and import checkpoints; start the trainers of a host.",
        epilog=_EXIT_STATUS,
        formatter_class=_Help,
    )
    parser.add_argument("--version", action="version", version=f"aiockpt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    _add_ls(commands)
    _add_inspect(commands)
    _add_diff(commands)
    _add_verify(commands)
    _add_rm(commands)
    _add_export(commands)
    _add_import(commands)
    _add_spawn(commands)
    _add_demo(commands)
    return parser


def _add_ls(commands: Commands[Parser]) -> None:
    ls = commands.add_parser(
        "ls", help="list the checkpoints of a run", description="List a run's checkpoints, newest first."
    )
    _add_run(ls)
    ls.add_argument("--all", action="store_true", help="list all, however many there are (--json always does)")


def _add_inspect(commands: Commands[Parser]) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="show what a checkpoint holds",
        description="Show the tree of a checkpoint, the newest unless told otherwise: tensors with dtype, shape and "
        "size, values, metadata, files. Layers that are alike are shown once. No tensor is read.",
        epilog="example: aiockpt inspect runs/exp1 --tensors 'model.layers.0'",
    )
    _add_run(inspect, or_step="a run directory, or the directory of one step")
    _add_step(inspect)
    _add_tensors(inspect, "list the tensors with these names, and where each lies")


def _add_diff(commands: Commands[Parser]) -> None:
    diff = commands.add_parser(
        "diff",
        help="compare two checkpoints, tensor by tensor",
        description="Compare two steps of a run: what came, what went, what has another form, and how far each tensor "
        "moved, the furthest first. Every byte that is read is verified. The exit status is 0 whether they differ or "
        "not.",
        epilog="example: aiockpt diff runs/exp1 1000 2000 --tensors 'model.*'",
    )
    _add_run(diff)
    for name in ("a", "b"):
        step = diff.add_argument(name, type=_step, metavar=name.upper(), help="training step")
        completion.attach(step, completion.steps)
    _add_tensors(diff, "compare only what has these names")
    diff.add_argument("--limit", type=_count, metavar="N", help="rows of the table (default: 20; all with --json)")


def _add_verify(commands: Commands[Parser]) -> None:
    verify = commands.add_parser(
        "verify",
        help="read checkpoints and compare all checksums",
        description="Read a checkpoint whole, the newest unless told otherwise, and compare every checksum. "
        "Exit status 1 says that one is bad.",
    )
    _add_run(verify, or_step="a run directory, or the directory of one step")
    which = verify.add_mutually_exclusive_group()
    _add_step(which)
    which.add_argument("--all", action="store_true", help="every step")


def _add_rm(commands: Commands[Parser]) -> None:
    rm = commands.add_parser(
        "rm",
        help="remove one checkpoint",
        description="Remove one checkpoint, at once out of sight, then from the disk. A job that saves into the run is "
        "not disturbed; a checkpoint that somebody reads is left, with exit status 2.",
    )
    _add_run(rm)
    completion.attach(rm.add_argument("step", type=_step, metavar="STEP", help="training step"), completion.steps)
    rm.add_argument("--bad", action="store_true", help="remove what a restore found bad of this step, and only that")


def _add_export(commands: Commands[Parser]) -> None:
    export = commands.add_parser(
        "export",
        help="write a checkpoint's tensors as safetensors, or as a torch.save file",
        description="Write a checkpoint for other programs; every checksum is verified, and what is written appears "
        "whole or not at all. DIR: model.safetensors, or shards and their index, and with --part the config.json of "
        "the module. FILE.safetensors: that one file. FILE.pt, .pth, .bin or .ckpt: the state with its values, for "
        "torch.load(weights_only=True). Safetensors holds tensors alone, each tied one once; complex128 becomes "
        "float64 with a last dimension of 2. In a torch.save file numpy arrays become tensors, and a few other types "
        "what comes nearest; the command says so.",
        epilog="example: aiockpt export runs/exp1 --part model --to exported",
    )
    _add_run(export, or_step="a run directory, or the directory of one step")
    _add_step(export)
    target = export.add_argument("--to", required=True, metavar="DIR|FILE", help="what to make; must not exist")
    completion.attach(target, completion.files)
    export.add_argument(
        "--part", metavar="NAME", help="only what stands below this name, under names without it, as in --part model"
    )
    _add_tensors(export, "only what has these names (of the whole state)")
    export.add_argument(
        "--max-shard-size",
        type=_size,
        metavar="SIZE",
        help="of each file in DIR, as in 5GB or 500MiB; no tensor is cut (default: 50GB)",
    )


def _add_import(commands: Commands[Parser]) -> None:
    import_ = commands.add_parser(
        "import",
        help="make a checkpoint of safetensors or a torch.save file",
        description="Save what another program wrote as a checkpoint of a run, which restores and loads like any "
        "other; it is the newest then. Tensors by name (safetensors, a module's state_dict) stand under model, the "
        "parts of any other torch.save file under their own keys. Nothing of it is executed: pickled code is refused.",
        epilog="example: aiockpt import llama-7b runs/exp1 --step 0",
    )
    source = import_.add_argument(
        "source", metavar="FILE|DIR", help="a safetensors or torch.save file, or a directory of safetensors files"
    )
    completion.attach(source, completion.files)
    _add_run(import_, or_step="run directory; made where it is missing")
    import_.add_argument("--step", type=_step, metavar="N", required=True, help="training step, which the run has not")
    import_.add_argument("--part", metavar="NAME", help="put everything under this key")


def _add_spawn(commands: Commands[Parser]) -> None:
    spawn = commands.add_parser(
        "spawn",
        usage="aiockpt spawn -n N [options] -- PROGRAM [ARGUMENT ...]",
        help="start the trainers of this host, stop them together, say why one failed",
        description="Start N processes of a program with what torch.distributed needs in their environment, as "
        "torchrun --standalone does. The first failure stops the others, a signal stops all, and nothing that they "
        "started is left. Of a failure a report tells on standard error.",
        epilog="exit status: 0 all succeeded; else that of the root cause, 128 + N for one that signal N ended. "
        "A signal to this command ends it too, once the trainers are gone. "
        "example: aiockpt spawn -n 4 --tee 3 --log-dir logs -- python train.py --device 'cuda:${local_rank}'",
    )
    spawn.add_argument(
        "-n",
        "--nprocs",
        metavar="N",
        required=True,
        help="trainers: a number; gpu, cpu: one for each; auto: gpu, or cpu",
    )
    spawn.add_argument(
        "--name", default="trainer", help="what they are called in prefixes and the report (default: %(default)s)"
    )
    _add_output(spawn)
    spawn.add_argument(
        "--stop-timeout",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="from the signal that stops the trainers until the last one is killed and gone (default: %(default)g)",
    )
    spawn.add_argument(
        "--numa-binding",
        choices=("node", "socket", "exclusive", "core-complex"),
        help="bind each trainer to CPUs near the GPU of its local rank",
    )
    spawn.add_argument(
        "--virtual-local-rank", action="store_true", help="each trainer sees its own GPU alone, with LOCAL_RANK=0"
    )
    spawn.add_argument("--run-id", metavar="ID", help="TORCHELASTIC_RUN_ID, and the name of logs (default: random)")
    command = spawn.add_argument(
        "command_line",
        nargs=argparse.REMAINDER,
        metavar="PROGRAM",
        help="with its arguments, in which ${local_rank} stands for the rank (quote it from your shell)",
    )
    completion.attach(command, completion.files)


def _add_output(spawn: argparse.ArgumentParser) -> None:
    """Add what says where the output of trainers goes."""
    streams = "1 stdout, 2 stderr, 3 both; by rank as in 0:3,1:2"
    log_dir = spawn.add_argument(
        "--log-dir", metavar="DIR", help="for log files (default: a temporary one; /dev/null: none, tee to the console)"
    )
    completion.attach(log_dir, completion.directories)
    spawn.add_argument("--redirects", default="0", metavar="STREAMS", help=f"to log files: {streams}")
    spawn.add_argument(
        "--tee", default="0", metavar="STREAMS", help="to log files, and to the console with the rank before each line"
    )
    spawn.add_argument(
        "--local-ranks-filter", type=_ranks, metavar="RANKS", help="only these write to the console, as in 0,3"
    )
    for stream in ("stdout", "stderr"):
        spawn.add_argument(
            f"--filter-{stream}",
            action="append",
            metavar="TEXT",
            help=f"copy lines of teed {stream} that have TEXT to one file for all ranks; may be given again",
        )


def _add_demo(commands: Commands[Parser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="train, be killed in the middle of a save, resume bit for bit",
        description="Train a small GPT on the source text of Python's standard library, saving every few steps; kill "
        "the trainer in the middle of a save, start it again, and compare every later loss with that of a run that "
        "nobody killed. Exit status 1 says that they differ.",
    )
    demo.add_argument("--steps", type=_count, default=24, help="training steps (default %(default)s)")
    demo.add_argument(
        "--size", choices=("tiny", "small", "medium"), default="small", help="of the model: 1, 10 or 50 M parameters"
    )
    kept = demo.add_argument(
        "--dir", metavar="DIR", help="keep the run's directories here (default: a temporary directory)"
    )
    completion.attach(kept, completion.directories)
    demo.add_argument("--seed", type=_step, default=0, help="of model, data and dropout (default %(default)s)")
    demo.add_argument("--device", default="cpu", help="cpu (default) or cuda")


def _add_run(parser: argparse.ArgumentParser, or_step: str = "run directory, as given to Checkpointer") -> None:
    completion.attach(parser.add_argument("run", metavar="RUN", help=or_step), completion.directories)
    parser.add_argument("--json", action="store_true", help="print JSON; needs no extra")


def _add_step(parser: argparse._ActionsContainer) -> None:
    step = parser.add_argument("--step", type=_step, metavar="N", help="this step instead of the newest")
    completion.attach(step, completion.steps)


def _add_tensors(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument(
        "--tensors",
        action="append",
        metavar="GLOB",
        help=f"{help}; dotted, with * ? [seq], and with all that is below; may be given again",
    )


def _step(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= MAX_STEP):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def _ranks(text: str) -> set[int]:
    try:
        return {_step(rank) for rank in text.split(",")}
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} does not name ranks, as 0,3 does") from None


def _size(text: str) -> int:
    found = _SIZE.fullmatch(text)
    nbytes = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if not nbytes:
        raise argparse.ArgumentTypeError(f"{text!r} is no size of at least 1 byte, such as 5GB or 500MiB")
    return nbytes


def _count(text: str) -> int:
    if _step(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
