"""Floors: what this machine can do at best, in a process that does nothing else.

No torch, no checksums, no format: a copy into memory that is there already, direct writes with one fdatasync, direct
reads. The process keeps its memory, and measures once for each line on its standard input: ``write 4`` with a file of
its own and four threads, ``read 4 PATH`` of all files below a path.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import mmap
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.sizes import size_argument

__all__ = ["THREADS", "Bench", "main"]

THREADS = {"memcpy": (1, 2), "write": (1, 2, 4, 8), "read": (1, 2, 4, 8)}
"""Each floor with the numbers of threads to try; the best one counts."""
_BLOCK_NBYTES = 16 << 20
_PAGE_NBYTES = 4096
_SPAN_NBYTES = 64 << 20
_libc = ctypes.CDLL(None, use_errno=True)  # its calls release the GIL
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class Bench:
    """Memory and a file to measure with.

    Args:
        nbytes: Of memory and of the file that is written.
        directory: Where the file goes.
    """

    def __init__(self, nbytes: int, directory: Path) -> None:
        self._nbytes = max(8192, nbytes - nbytes % 8192)
        self._file = directory / "floor"
        self._memory = mmap.mmap(-1, self._nbytes)
        noise = os.urandom(1 << 20)
        for start in range(0, self._nbytes, len(noise)):  # every page faulted in, with content of its own
            part = noise[: self._nbytes - start]
            self._memory[start : start + len(part)] = part
        self._blocks = max(THREADS["read"])
        self._bounce = mmap.mmap(-1, self._blocks * _BLOCK_NBYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages, into which reads are faster
            self._bounce.madvise(mmap.MADV_HUGEPAGE)
        for block in range(self._blocks):
            self._bounce[block * _BLOCK_NBYTES : (block + 1) * _BLOCK_NBYTES] = bytes(_BLOCK_NBYTES)

    def measure(self, floor: str, threads: int, path: Path | None = None) -> float:
        """Measure once; returns GB/s."""
        match floor:
            case "memcpy":
                return self._nbytes / 2 / self._copy(threads) / 1e9
            case "write":
                return self._nbytes / self._write(threads) / 1e9
        if path is None and not self._file.exists():
            self._write(threads)
        nbytes, elapsed = self._read(path or self._file, threads)
        return nbytes / elapsed / 1e9

    def close(self) -> None:
        """Remove the file."""
        self._file.unlink(missing_ok=True)

    def _copy(self, threads: int) -> float:
        """Copy the first half of the memory over the second."""
        half = self._nbytes // 2
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))

        def copy(start: int, stop: int) -> None:
            ctypes.memmove(address + half + start, address + start, stop - start)

        return _timed(copy, half, threads, _SPAN_NBYTES)

    def _write(self, threads: int) -> float:
        self._file.unlink(missing_ok=True)
        os.sync()  # the removal of the last file is not what is measured
        view = memoryview(self._memory)
        descriptor = _open_direct(self._file, os.O_WRONLY | os.O_CREAT)

        def write(start: int, stop: int) -> None:
            while start < stop:
                start += os.pwrite(descriptor, view[start:stop], start)

        try:
            begin = time.perf_counter()
            # Reserving the space is a part of every good writer, and where a file system cannot, the write does it.
            _libc.fallocate(descriptor, 0, 0, self._nbytes)
            reserved = time.perf_counter() - begin
            return reserved + _timed(write, self._nbytes, threads, _BLOCK_NBYTES, lambda: os.fdatasync(descriptor))
        finally:
            view.release()
            os.close(descriptor)

    def _read(self, path: Path, threads: int) -> tuple[int, float]:
        """Read all files below a path; returns their bytes and the seconds."""
        files = [file for file in sorted(path.rglob("*")) if file.is_file()] if path.is_dir() else [path]
        opened = [_open_direct(file, os.O_RDONLY) for file in files]
        sizes = [os.fstat(descriptor).st_size for descriptor in opened]
        pieces = [
            (descriptor, start, min(size - start, _BLOCK_NBYTES))
            for descriptor, size in zip(opened, sizes, strict=True)
            for start in range(0, size, _BLOCK_NBYTES)
        ]
        view = memoryview(self._bounce)

        def read(number: int, _: int) -> None:
            descriptor, offset, nbytes = pieces[number]
            place = number % self._blocks * _BLOCK_NBYTES
            # Whole sectors, as direct reads must be; at the file's end they return what there is.
            target = view[place : place - (-nbytes // _PAGE_NBYTES) * _PAGE_NBYTES]
            done = 0
            while done < nbytes:
                count = os.preadv(descriptor, [target[done:]], offset + done)
                if not count:
                    raise OSError(f"a file of {path} became shorter")
                done += count

        try:
            return sum(sizes), _timed(read, len(pieces), threads, 1)
        finally:
            view.release()
            for descriptor in opened:
                os.close(descriptor)


def _open_direct(file: Path, flags: int) -> int:
    try:
        return os.open(file, flags | os.O_DIRECT, 0o600)
    except OSError:
        return os.open(file, flags, 0o600)  # a file system without direct I/O has a buffered floor


def _timed(
    work: Callable[[int, int], None],
    nbytes: int,
    threads: int,
    span: int,
    finish: Callable[[], None] = lambda: None,
) -> float:
    spans = [(start, min(start + span, nbytes)) for start in range(0, nbytes, span)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: None, range(threads)))  # the threads are there before the clock starts
        begin = time.perf_counter()
        list(pool.map(lambda piece: work(*piece), spans))
        finish()
        return time.perf_counter() - begin


def main(argv: list[str] | None = None) -> None:
    """Answer each request with one rate, until end-of-file."""
    parser = argparse.ArgumentParser(prog="python -m bench.floors")
    parser.add_argument("--size", type=size_argument, required=True)
    parser.add_argument("--dir", type=Path, required=True)
    args = parser.parse_args(argv)
    bench = Bench(args.size, args.dir)
    for line in sys.stdin:
        floor, threads, *path = line.rstrip("\n").split(" ", 2)
        print(bench.measure(floor, int(threads), Path(path[0]) if path else None), flush=True)
    bench.close()


if __name__ == "__main__":
    main()
