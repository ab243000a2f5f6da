"""Floors: what this machine can do at best, in a process that does nothing else.

``python -m bench.floors --size 2GiB --dir DIR`` prints one sample of each as JSON. No torch, no checksums, no format:
a copy into memory that is there already, direct writes with one fdatasync, direct reads.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.sizes import size_argument

__all__ = ["MEMCPY_THREADS", "THREADS", "main", "sample"]

THREADS = (1, 2, 4, 8)
MEMCPY_THREADS = (1, 2)
_BLOCK_NBYTES = 16 << 20
_SPAN_NBYTES = 64 << 20
_libc = ctypes.CDLL(None, use_errno=True)  # its calls release the GIL
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def sample(nbytes: int, directory: Path) -> dict[str, dict[str, float]]:
    """Measure each floor once, for each number of threads, in GB/s."""
    nbytes = max(4096, nbytes - nbytes % 4096)
    source, target = _memory(nbytes), _memory(nbytes)
    file = directory / "floor"
    result: dict[str, dict[str, float]] = {"memcpy_gbps": {}, "write_gbps": {}, "read_gbps": {}}
    for threads in MEMCPY_THREADS:
        result["memcpy_gbps"][str(threads)] = nbytes / _copy(source, target, nbytes, threads) / 1e9
    for threads in THREADS:
        result["write_gbps"][str(threads)] = nbytes / _write(file, source, nbytes, threads) / 1e9
    for threads in THREADS:
        result["read_gbps"][str(threads)] = nbytes / _read(file, target, nbytes, threads) / 1e9
    file.unlink()
    return result


def _memory(nbytes: int) -> mmap.mmap:
    """Return anonymous memory, every page of it faulted in with its own content."""
    memory = mmap.mmap(-1, nbytes)
    noise = os.urandom(1 << 20)
    for start in range(0, nbytes, len(noise)):
        memory[start : start + len(noise)] = noise[: min(len(noise), nbytes - start)]
    return memory


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _copy(source: mmap.mmap, target: mmap.mmap, nbytes: int, threads: int) -> float:
    start_of_source, start_of_target = _address(source), _address(target)

    def copy(start: int, stop: int) -> None:
        ctypes.memmove(start_of_target + start, start_of_source + start, stop - start)

    return _timed(copy, nbytes, threads, _SPAN_NBYTES, lambda: None)


def _write(file: Path, source: mmap.mmap, nbytes: int, threads: int) -> float:
    file.unlink(missing_ok=True)
    view = memoryview(source)
    descriptor = _open_direct(file, os.O_WRONLY | os.O_CREAT)

    def write(start: int, stop: int) -> None:
        while start < stop:
            start += os.pwrite(descriptor, view[start:stop], start)

    try:
        # Reserving the space is a part of every good writer, and where a file system cannot, the write does it.
        begin = time.perf_counter()
        _libc.fallocate(descriptor, 0, 0, nbytes)
        reserved = time.perf_counter() - begin
        return reserved + _timed(write, nbytes, threads, _BLOCK_NBYTES, lambda: os.fdatasync(descriptor))
    finally:
        view.release()
        os.close(descriptor)


def _read(file: Path, target: mmap.mmap, nbytes: int, threads: int) -> float:
    view = memoryview(target)
    descriptor = _open_direct(file, os.O_RDONLY)

    def read(start: int, stop: int) -> None:
        while start < stop:
            count = os.preadv(descriptor, [view[start:stop]], start)
            if not count:
                raise OSError(f"{file} ends at {start}")
            start += count

    try:
        return _timed(read, nbytes, threads, _BLOCK_NBYTES, lambda: None)
    finally:
        view.release()
        os.close(descriptor)


def _open_direct(file: Path, flags: int) -> int:
    try:
        return os.open(file, flags | os.O_DIRECT, 0o600)
    except OSError:
        return os.open(file, flags, 0o600)  # a file system without direct I/O has a buffered floor


def _timed(work: Callable[[int, int], None], nbytes: int, threads: int, span: int, finish: Callable[[], None]) -> float:
    spans = [(start, min(start + span, nbytes)) for start in range(0, nbytes, span)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: None, range(threads)))  # the threads are there before the clock starts
        begin = time.perf_counter()
        list(pool.map(lambda piece: work(*piece), spans))
        finish()
        return time.perf_counter() - begin


def main(argv: list[str] | None = None) -> None:
    """Print one sample as JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.floors")
    parser.add_argument("--size", type=size_argument, required=True)
    parser.add_argument("--dir", type=Path, required=True)
    args = parser.parse_args(argv)
    print(json.dumps(sample(args.size, args.dir)))


if __name__ == "__main__":
    main()
