"""The bounded buffer between one stream and one place it is written to."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from aiockpt.elastic.printing import feed as module
from aiockpt.elastic.printing.feed import Feed


class Place:
    """Takes when it is told to, as a writer's thread does."""

    def __init__(self, prefix: bytes = b"") -> None:
        self.woken = 0
        self.gaps: list[str] = []
        self.marks: list[str] = []
        self.excuse = "too slow"
        self.written = b""
        wake: Callable[[Feed[None]], None] = lambda feed: setattr(self, "woken", self.woken + 1)  # noqa: E731
        self.feed = Feed(
            None,
            wake=wake,
            excuse=lambda: self.excuse,
            prefix=prefix,
            on_gap=self.gaps.append,
            on_mark=self.marks.append,
        )

    def take(self) -> None:
        while self.feed.take():
            data = b"".join(self.feed.taken)
            self.written += data
            self.feed.wrote(len(data))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer of 20 bytes, without overhead."""
    monkeypatch.setattr(module, "MOST_WAITING_NBYTES", 20)
    monkeypatch.setattr(module, "_RESUME_NBYTES", 10)
    monkeypatch.setattr(module, "_BLOCK_NBYTES", 0)


def test_everything_in_order_while_it_fits() -> None:
    """Blocks go through unchanged; the other thread is woken once for all that waits."""
    place = Place()
    for text in (b"a\n", b"b", b"c\n"):
        place.feed.put(text)
    assert (place.woken, place.feed.waiting_nbytes) == (1, 5)
    place.take()
    assert (place.written, place.feed.waiting_nbytes) == (b"a\nbc\n", 0)
    place.feed.put(b"d\n")
    assert place.woken == 2


def test_whole_lines_are_dropped_and_the_gap_is_marked() -> None:
    """The line that was begun is ended, whole lines go, and the mark stands where they are missing (R-TL-9)."""
    place = Place()
    place.feed.put(b"0123456789abcd\nbeg")
    place.feed.put(b"un\nlost 1\nlost 2\nlos")
    place.feed.put(b"t 3\nlost 4\n")
    assert place.gaps == ["too slow"]
    place.take()
    place.feed.put(b"kept\n")
    place.take()
    assert place.written == b"0123456789abcd\nbegun\n[aiockpt: 4 lines dropped: too slow]\nkept\n"
    assert place.marks == ["4 lines dropped: too slow"]
    assert (place.feed.dropped_lines, place.feed.dropped_nbytes) == (4, 28)


def test_a_gap_ends_at_a_line_start() -> None:
    """The rest of a line whose beginning was dropped is dropped too, however late its end comes."""
    place = Place()
    place.feed.put(b"x" * 19 + b"\n")
    place.feed.put(b"lost, ")
    place.take()
    place.feed.put(b"still lost, ")
    place.feed.put(b"end\nkept\n")
    place.take()
    assert place.written == b"x" * 19 + b"\n[aiockpt: 1 line dropped: too slow]\nkept\n"


def test_a_gap_lasts_until_half_is_free() -> None:
    """One byte that was written does not end it: few long gaps, not many short ones."""
    place = Place()
    place.feed.put(b"123456789\n")
    place.feed.put(b"abcdefghi\n")
    place.feed.put(b"lost\n")
    assert place.feed.take()
    place.feed.wrote(5)
    place.feed.put(b"lost\n")
    assert place.feed.dropped_lines == 2
    place.feed.wrote(5)
    place.feed.put(b"kept\n")
    assert place.feed.dropped_lines == 2


def test_a_line_with_no_end_at_the_gap() -> None:
    """Where the line that was begun has no end in sight, the mark ends it."""
    place = Place(prefix=b"[w0]:")
    place.feed.put(b"x" * 18)
    place.feed.put(b"y" * 10)
    place.take()
    place.feed.put(b"y\nkept\n")
    place.take()
    assert place.written == b"x" * 18 + b"\n[w0]:[aiockpt: 1 line dropped: too slow]\nkept\n"


def test_the_end_marks_the_last_gap() -> None:
    """A gap that nothing follows is marked at the end, with the reason it began with."""
    place = Place()
    place.feed.put(b"x" * 20)
    place.excuse = "No space left on device"
    place.feed.put(b"\nlost\nlo")
    place.excuse = "something else"
    place.feed.end()
    place.feed.end()
    place.take()
    assert place.written == b"x" * 20 + b"\n[aiockpt: 2 lines dropped: No space left on device]\n"


def test_behind() -> None:
    """Where half of the buffer is full it pays to wait a little; where lines are dropped already it does not."""
    place = Place()
    place.feed.put(b"123456789\n")
    assert not place.feed.is_behind
    place.feed.put(b"\n")
    assert place.feed.is_behind
    place.feed.put(b"123456789\n")
    assert not place.feed.is_behind
    assert place.feed.dropped_lines == 1


def test_something_larger_than_the_buffer() -> None:
    """It goes through where nothing else waits: there is no smaller way to write it."""
    place = Place()
    place.feed.put(b"x" * 50 + b"\n")
    assert place.feed.dropped_lines == 0
    assert place.feed.is_behind


def test_parts_of_blocks() -> None:
    """A write may end within a block; the rest comes first next time."""
    place = Place()
    place.feed.put(b"abc\n")
    place.feed.put(b"def\n")
    assert place.feed.take()
    place.feed.wrote(5)
    assert place.feed.taken == [b"ef\n"]
    assert place.feed.waiting_nbytes == 3
    place.feed.wrote(3)
    assert not place.feed.take()


def test_given_up() -> None:
    """What waits and what comes is dropped and counted, and nothing is kept."""
    place = Place()
    place.feed.put(b"a\nb\n")
    place.feed.give_up()
    place.feed.put(b"c\n")
    place.feed.end()
    assert not place.feed.take()
    assert (place.feed.dropped_lines, place.feed.dropped_nbytes, place.feed.waiting_nbytes) == (3, 6, 0)


def test_abandoned() -> None:
    """What waits is counted once, also what was taken."""
    place = Place()
    place.feed.put(b"a\nb\n")
    assert place.feed.take()
    place.feed.put(b"c\n")
    assert place.feed.abandon() == 6
    assert place.feed.abandon() == 0
    assert (place.feed.dropped_lines, place.feed.dropped_nbytes) == (3, 6)


def test_objects_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream printed byte by byte fills the buffer with what the objects take, not only with its bytes."""
    monkeypatch.setattr(module, "_BLOCK_NBYTES", 9)
    place = Place()
    for _ in range(3):
        place.feed.put(b"\n")
    assert place.feed.dropped_lines == 1
