"""Tables: what gives way where there is little room."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from aiockpt.cli.screen import in_old_encoding, printable, size_text
from aiockpt.cli.table import Cell, Column, table

COLUMNS = (
    Column("name", cut="middle"),
    Column("what", cut="end"),
    Column("size", right=True, rank=1),
    Column("note", rank=2),
)
ROW = ("model.layers.0.attention.weight", "float32 [1024, 1024]", "4 MiB", "tied to another")


def lines(width: int, *rows: tuple[Cell | str, ...]) -> list[str]:
    return table(COLUMNS, rows or (ROW,), width).plain.splitlines()


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (1 << 20, "model.layers.0.attention.weight  float32 [1024, 1024]  4 MiB  tied to another"),
        (77, "model.layers.0.attention.weight  float32 [1024, 1024]  4 MiB  tied to another"),
        (70, "model.la…ttention.weight  float32 [1024, 1024]  4 MiB  tied to another"),
        (60, "model.…ion.weight  float32 [1024, 1…  4 MiB  tied to another"),
        (55, "model.lay…attention.weight  float32 [1024, 1024]  4 MiB"),
        (45, "model.…tion.weight  float32 [1024, 10…  4 MiB"),
        (38, "model.…tion.weight  float32 [1024, 10…"),
        (9, "m…t  flo…"),
    ],
)
def test_what_gives_way(width: int, shown: str) -> None:
    """First the columns of the highest rank, then the widest text."""
    assert lines(width)[1] == shown
    assert len(lines(width)[1]) <= width


def test_no_terminal_is_too_narrow() -> None:
    """One column of the screen is no error."""
    for width in range(1, 40):
        assert all(len(line) <= max(width, 8) for line in lines(width))


def test_an_empty_column_takes_no_room() -> None:
    """Not even its title, if it may go at all; and nothing stands at the end of a line."""
    assert lines(80, ("a", "b", "", ""), ("ccc", "", "", "")) == ["name  what", "a     b", "ccc"]


def test_a_heading_may_be_longer_than_its_column() -> None:
    """A row with nothing behind its first cell has the line for itself, up to the end of the terminal."""
    heading = Cell("model/model-00001-of-00001.safetensors", "bold")
    assert lines(30, ("w", "x", "1 B", "n"), (heading, "", "", "")) == [
        "name  what  size  note",
        "w     x      1 B  n",
        "model/mode…f-00001.safetensors",
    ]
    assert lines(80, ("w", "x", "1 B", "n"), (heading, "", "", ""))[2] == heading.text


def test_the_lines_of_a_tree_are_not_cut() -> None:
    """Only the name behind them."""
    tree = Cell("│  │  ├─ attention_and_more", "", 9)
    assert lines(24, (tree, "x" * 30, "", ""))[1].startswith("│  │  ├─ ")


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(*[st.text(st.characters(categories=["L", "N", "S"]), max_size=60)] * 4), min_size=1, max_size=5),
    st.integers(40, 120),
)
def test_no_line_is_wider_than_the_terminal(rows: list[tuple[str, str, str, str]], width: int) -> None:
    """Whatever is in it, letters that take two columns too, as long as what cannot be cut fits."""
    short = [(name, what, size[:6], note) for name, what, size, note in rows]
    assert all(cell_len(line) <= width for line in lines(width, *short))


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1000 << 10, "0.977 MiB"),
        (5 << 40, "5 TiB"),
        (1 << 55, "32768 TiB"),
    ],
)
def test_sizes(nbytes: int, text: str) -> None:
    """Three digits, and a unit that fits."""
    assert size_text(nbytes) == text


def test_text_for_every_terminal() -> None:
    """Control characters are shown; what an encoding has not is replaced."""
    assert printable("a\x1b[0m\u202eb\udc80é") == "a\\x1b[0m\\u202eb\\udc80é"
    with pytest.raises(UnicodeEncodeError) as caught:
        "a→".encode("ascii")
    assert in_old_encoding(caught.value) == ("->", 2)
