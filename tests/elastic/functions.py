"""What the processes of the tests run; importable, since a function travels by its name."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any


def double(value: int) -> int:
    return 2 * value


def echo(value: Any) -> Any:
    return value


def environment(*names: str) -> list[str | None]:
    return [os.environ.get(name) for name in names]


def either(function: Any, *args: Any) -> Any:
    return function(*args)


def fail(text: str) -> None:
    raise ValueError(text)


def leave(code: Any) -> None:
    sys.exit(code)


def vanish(code: int) -> None:
    os._exit(code)


def interrupt_itself() -> None:
    raise KeyboardInterrupt


def kill_itself(signum: int) -> None:
    os.kill(os.getpid(), signum)
    time.sleep(60)


def sleep(seconds: float = 1000) -> None:
    time.sleep(seconds)


def ignore_and_sleep(ready: str) -> None:
    """Ignore what asks for the end."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    Path(ready).touch()
    wait_where_the_stack_shows_it()


def wait_where_the_stack_shows_it() -> None:
    threading.Event().wait(1000)


class Unreturnable:
    """Cannot be pickled."""

    def __reduce__(self) -> Any:
        raise TypeError("this one stays where it is")


def return_what_cannot_be() -> Unreturnable:
    return Unreturnable()


class Unreadable:
    """Can be pickled, and not be made again."""

    def __reduce__(self) -> Any:
        return _not_here, ()


def _not_here() -> None:
    raise RuntimeError("not in the supervisor")


def return_what_cannot_be_read() -> Unreadable:
    return Unreadable()


def die_in_a_value(nbytes: int) -> bytes:
    """Die with half of the value sent."""
    send_all = socket.socket.sendall

    def send_half(self: socket.socket, data: Any) -> None:
        send_all(self, data[: len(data) // 2 or len(data)])
        if len(data) > 1000:
            os.kill(os.getpid(), signal.SIGKILL)

    socket.socket.sendall = send_half  # type: ignore[method-assign,assignment]
    return bytes(nbytes)


def say(text: str, to: str = "stdout") -> None:
    print(text, file=getattr(sys, to), flush=True)


def start_others_and_fail(pid_file: str) -> None:
    """Leave behind a child in the group, one in a session of its own, and one without its parent."""
    pids = []
    for new_session in (False, True):
        pid = os.fork()
        if pid == 0:
            if new_session:
                os.setsid()
            time.sleep(1000)
            os._exit(0)
        pids.append(pid)
    Path(pid_file).write_text(" ".join(map(str, pids)))
    os._exit(3)


def is_handler_default(signum: int) -> bool:
    return signal.getsignal(signum) in (signal.SIG_DFL, signal.default_int_handler)


def wait_for_file_and_fail(path: str) -> None:
    while not Path(path).exists():
        time.sleep(0.01)
    raise RuntimeError("the other one is there")


def say_in_many_ways() -> None:
    """By Python, by C, by the descriptor, and by a process of its own."""
    sys.stdout.write("python\n")
    sys.stdout.flush()
    libc = ctypes.CDLL(None)
    libc.puts(b"C")
    libc.fflush(None)
    os.write(1, b"descriptor\n")
    subprocess.run(["echo", "grandchild"], check=True)
