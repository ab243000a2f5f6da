"""How far each file is staged: the worker may write what is final from a file's beginning on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from aiockpt.staging.layout import Layout

__all__ = ["Progress"]


class Progress:
    """Turns copied tensors, in any order, into a growing staged prefix of each file.

    Headers and plain files are in the arena before any tensor is copied, so they count as staged at once.

    Args:
        layout: Of the save.
        report: Called with file and bytes staged from its beginning: once for a file without tensor bytes, else when
            a further block is complete and at the file's end. Growing for each file.
        block_nbytes: Unit in which the worker writes; less than a further block would be of no use to it.

    Thread-safety: none; one thread at a time.
    """

    def __init__(self, layout: Layout, report: Callable[[int, int], None], *, block_nbytes: int) -> None:
        self._layout = layout
        self._files = layout.plan.files
        self._report = report
        self._block_nbytes = block_nbytes
        self._done = bytearray(layout.empty)
        self._next = [first for first, _ in layout.spans]
        self._blocks = [0] * len(self._files)
        self._partly = (-1, 0)

    def begin(self) -> None:
        """Report the files that hold no tensor bytes."""
        for file, image in enumerate(self._files):
            if image.nbytes == image.data_start or image.data_start == 0:
                self._report(file, image.nbytes)

    def copied(self, positions: Sequence[int]) -> None:
        """Note that all bytes of these positions, in rising order, are staged."""
        if not positions:
            return
        done = self._done
        for position in positions:
            done[position] = 1
        file_of = self._layout.file_of
        for file in range(file_of[positions[0]], file_of[positions[-1]] + 1):
            self._advance(file)

    def partly(self, position: int, nbytes: int) -> None:
        """Note that the first ``nbytes`` of one position, not all, are staged."""
        self._partly = (position, nbytes)
        file = self._layout.file_of[position]
        if self._next[file] == position:
            self._advance(file)

    def _advance(self, file: int) -> None:
        image = self._files[file]
        stop = self._layout.spans[file][1]
        if self._next[file] == stop:  # also the plain files between two images
            return
        at = self._done.find(0, self._next[file], stop)
        at = stop if at < 0 else at
        self._next[file] = at
        if at == stop:
            if image.nbytes > image.data_start:
                self._report(file, image.nbytes)
            return
        staged = self._layout.starts[at] + (self._partly[1] if self._partly[0] == at else 0)
        blocks = (staged - image.data_start) // self._block_nbytes
        if blocks > self._blocks[file]:
            self._blocks[file] = blocks
            self._report(file, staged)
