"""What the demo shows: a bar while it trains, a table of the saves at its end."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from aiockpt.cli.screen import console, size_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from aiockpt.cli.demo import Story

__all__ = ["Screen", "show_result"]

_SHOWN_DIFFERENCES = 5


class Screen:
    """The bar and the lines above it; a context manager that gives the terminal back.

    Args:
        total: Steps to train in all, not counting those that are trained again.
    """

    def __init__(self, total: int) -> None:
        self.console = console()
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=total, loss="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.stop()

    def stage(self, text: str) -> None:
        """Say what is done from now on."""
        self._bar.update(self._task, description=text, loss="")
        if not self.console.is_terminal:
            self.note(text)

    def again(self, steps: int) -> None:
        """Take in that so many steps are trained once more, from the beginning."""
        self._bar.update(self._task, advance=-steps)

    def note(self, text: str) -> None:
        """Say what has happened."""
        self.console.print(text, soft_wrap=True)

    def hear(self, event: dict[str, Any]) -> None:
        """Move the bar."""
        if event["event"] == "step":
            self._bar.update(self._task, advance=1, loss=f"loss {float.fromhex(event['loss']):.3f}")

    def resumed(self, step: int | None, *, by_worker: bool) -> None:
        """Say from where the run goes on."""
        how = "which the worker had finished without its trainer" if by_worker else "the newest good checkpoint"
        self.note("nothing was saved yet, starting anew" if step is None else f"resumed from step {step}, {how}")


def show_result(screen: Console, story: Story, *, kept: Path | None) -> None:
    """Print the saves, then the verdict."""
    screen.print(_table(story))
    differences = story.differences()
    steps = len(story.reference.losses)
    if differences:
        for line in differences[:_SHOWN_DIFFERENCES]:
            screen.print(line, style="red", soft_wrap=True)
        screen.print(f"NOT bit-exact: {len(differences)} differences", style="bold red")
    else:
        screen.print(
            f"All {steps} losses, and the final model, optimizer, scheduler, random state and data position, are those "
            "of the uninterrupted run, bit for bit.",
            style="bold green",
        )
    screen.print(f"{story.seconds:.0f} s in all", style="dim")
    if kept is not None:
        screen.print(f"kept: {kept} (look with: aiockpt ls {kept})", soft_wrap=True)


def _table(story: Story) -> Table:
    from rich.table import Table

    saves = story.saving.saves
    nbytes = next((save["nbytes"] for save in saves.values()), 0)
    title = f"saves of {size_text(nbytes)}; torch.save with fsync blocks until it is durable"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("step", "blocked", "staged", "durable", "GB/s", "torch.save", "GB/s"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    for step in sorted(story.reference.saves):
        reference, save = story.reference.saves[step], saves.get(step)
        cells = ["-"] * 4 if save is None else _cells(save)
        *_, durable, rate = _cells(reference)
        table.add_row(str(step), *cells, durable, rate, "killed here" if step == story.killed_saving else "")
    return table


def _cells(save: dict[str, float]) -> list[str]:
    times = [f"{save[name] * 1e3:.1f} ms" for name in ("blocked", "staged", "durable")]
    return [*times, f"{save['nbytes'] / save['durable'] / 1e9:.2f}"]
