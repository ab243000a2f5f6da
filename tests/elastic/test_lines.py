"""Lines of one stream, whatever the pieces its bytes arrive in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiockpt.elastic.printing import lines
from aiockpt.elastic.printing.lines import LONGEST_LINE_NBYTES, Lines, matching, needles, prefixed, printable, settled

pieces_of_output = st.lists(
    st.sampled_from([b"a", b"bc", b"\n", b"\r", b"\r\n", "é".encode(), "€".encode(), b"\xff", b"x" * 9]), max_size=40
)


def whole(data: bytes) -> bytes:
    """Return all that comes of ``data`` in one piece."""
    one = Lines()
    return one.feed(data, 0.0) + one.end()


@given(pieces_of_output, st.integers(1, 7))
def test_lines_do_not_depend_on_where_they_were_cut(output: list[bytes], nbytes: int) -> None:
    """Cut at any place, also within characters and between \\r and \\n, the same lines come out (R-TL-10)."""
    data = b"".join(output)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "LONGEST_LINE_NBYTES", 7)
        expected = whole(data)
        for cut in range(len(data) + 1):
            two = Lines()
            assert two.feed(data[:cut], 0.0) + two.feed(data[cut:], 0.0) + two.end() == expected
        many = Lines()
        found = [many.feed(data[at : at + nbytes], 0.0) for at in range(0, len(data), nbytes)]
        assert b"".join(found) + many.end() == expected
        assert all(len(line) <= 7 for line in expected.split(b"\n"))


@given(st.lists(st.binary(max_size=20).map(lambda line: line.replace(b"\n", b"").replace(b"\r", b"")), max_size=20))
def test_lines_without_returns_come_out_as_they_went_in(output: list[bytes]) -> None:
    """Whatever bytes a line has, it is neither changed nor lost."""
    data = b"".join(line + b"\n" for line in output)
    assert whole(data) == data


def test_a_line_in_two_parts_is_one_line() -> None:
    """Nothing of a line is passed on before its end (E-62, R-TL-10)."""
    stream = Lines()
    assert stream.feed(b"one\nab", 0.0) == b"one\n"
    assert stream.feed(b"c", 0.5) == b""
    assert stream.feed(b"def\n", 0.6) == b"abcdef\n"
    assert stream.due_at is None


def test_an_unfinished_line_is_due_after_a_quiet_time() -> None:
    """It is passed on with a newline a second after the last byte; only while it waits there is a timer (R-TL-10)."""
    stream = Lines()
    assert stream.due_at is None
    stream.feed(b"Password", 10.0)
    assert stream.due_at == 11.0
    stream.feed(b": ", 10.8)
    assert stream.due_at == 11.8
    assert stream.expire() == b"Password: \n"
    assert stream.due_at is None
    assert stream.end() == b""


def test_the_newline_of_a_line_that_was_passed_on_is_no_empty_line() -> None:
    """What was ended by us is not ended twice, and what comes instead of the newline is a line of its own."""
    stream = Lines()
    stream.feed(b"loading...", 0.0)
    stream.expire()
    assert stream.feed(b"\n", 3.0) == b""
    assert stream.feed(b"\n", 3.0) == b"\n"
    stream.feed(b"loading...", 4.0)
    stream.expire()
    assert stream.feed(b" done\n", 6.0) == b" done\n"


def test_the_end_adds_a_newline() -> None:
    """Last words without a newline are a line; a stream that ended with one has no more (R-TL-10)."""
    stream = Lines()
    stream.feed(b"a\nSegmentation fault", 0.0)
    assert stream.end() == b"Segmentation fault\n"
    assert stream.end() == b""
    assert whole(b"a\n") == b"a\n"
    assert whole(b"") == b""


def test_a_progress_bar_is_one_line() -> None:
    """Of 10,000 updates the last one is the line (E-63, R-TL-10)."""
    updates = b"".join(b"\r%3d%%|%s|" % (at // 100, b"#" * (at // 500)) for at in range(10_001))
    assert whole(updates + b"\ndone\n") == b"100%|" + b"#" * 20 + b"|\ndone\n"
    assert whole(updates) == b"100%|" + b"#" * 20 + b"|\n"


def test_updates_are_shown_once_a_second() -> None:
    """A line that is overwritten is shown at most so often, with what is newest, and goes on (E-63, R-TL-10)."""
    stream = Lines()
    shown = []
    for at in range(1000):  # 100 updates a second, for 10 s
        now = at / 100
        if stream.due_at is not None and now >= stream.due_at:
            shown.append(stream.expire())
        assert stream.feed(b"\r%d" % at, now) == b""
    assert len(shown) == 9
    assert shown[0] == b"99\r"
    assert shown[-1] == b"899\r"
    assert stream.feed(b"\n", 10.0) == b"999\n"
    assert stream.due_at is None


def test_updates_that_end_with_a_return() -> None:
    """A bar whose updates have the return at their end is shown as well as one that has it before them."""
    stream = Lines()
    stream.feed(b"10%\r20%\r", 0.0)
    assert stream.due_at == 1.0
    assert stream.expire() == b"20%\r"
    assert stream.due_at is None
    assert stream.feed(b"done\n", 2.0) == b"done\n"


def test_returns_alone_are_nothing() -> None:
    """They show nothing, so there is nothing to wait for."""
    stream = Lines()
    assert stream.feed(b"\r\r", 0.0) == b""
    assert stream.due_at is None
    assert stream.end() == b""


def test_both_line_ends() -> None:
    """\\r\\n ends a line like \\n, also where the two were read apart."""
    assert whole(b"a\r\nb\r\r\n\r\nc\n") == b"a\nb\n\nc\n"
    stream = Lines()
    assert stream.feed(b"a\r", 0.0) == b""
    assert stream.feed(b"\nb", 0.0) == b"a\n"


def test_a_line_without_end_takes_no_memory() -> None:
    """A quarter of a GiB without a newline is passed on in pieces; never more than one piece waits."""
    stream, chunk, passed = Lines(), b"x" * (256 << 10), 0
    for _ in range(1024):
        for line in stream.feed(chunk, 0.0).splitlines():
            assert len(line) == LONGEST_LINE_NBYTES
            passed += len(line)
        assert len(stream._rest) <= LONGEST_LINE_NBYTES
    assert passed + len(stream.end()) - 1 == 1024 * len(chunk)


def test_updates_without_end_take_no_memory() -> None:
    """Neither does a progress bar that is never done."""
    stream, chunk = Lines(), b"\r" + b"x" * 99
    for _ in range(100):
        assert stream.feed(chunk * 5000, 0.0) == b""
    assert len(stream._rest) + len(stream._over) <= 200


def test_long_lines_are_cut_between_characters() -> None:
    """Each piece of a long line is text."""
    text = "€" * 50_000
    found = whole(text.encode() + b"\nshort\n")
    assert found.decode().replace("\n", "") == text + "short"
    assert max(map(len, found.split(b"\n"))) <= LONGEST_LINE_NBYTES
    assert whole(b"\xbf" * 100_000).count(b"\n") == 2, "what is no text is cut all the same"


def test_prefix() -> None:
    """Each line has the prefix, an update too (R-TL-3)."""
    assert prefixed(b"a\n\nb\n", b"[w0]:") == b"[w0]:a\n[w0]:\n[w0]:b\n"
    assert prefixed(b"50%\r", b"[w0]:") == b"[w0]:50%\r"
    assert prefixed(b"a\n", b"") == b"a\n"


def test_bytes_that_are_no_text_are_replaced() -> None:
    """Each is shown as a replacement character; text is left alone (R-TL-7)."""
    assert printable(b"a\n") == b"a\n"
    assert printable("é€\n".encode()) == "é€\n".encode()
    assert printable(b"\xffa\xc3\n").decode() == "�a�\n"


def test_settled_keeps_what_has_no_returns() -> None:
    """An unfinished last line is settled too."""
    assert settled(b"a\nb") == b"a\nb"
    assert settled(b"a\rb\nc\rd") == b"b\nd"


@given(
    st.lists(st.text("abc ", max_size=6), max_size=12),
    st.lists(st.text("abc\n", max_size=3), max_size=3),
)
def test_filters(output: list[str], filters: list[str]) -> None:
    """A line is chosen if it contains any of the strings, as ``in`` says (R-MP-41, R-TL-5)."""
    text = [line + "\n" for line in output]
    expected = "".join(line for line in text if any(each in line for each in filters))
    assert matching("".join(text).encode(), needles(filters)).decode() == expected
