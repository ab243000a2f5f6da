"""Every requirement and every weakness has a test, or a reason why not."""

from __future__ import annotations

from tests.elastic.coverage import NUMBERS, OUT, PAGE, shown, table


def test_each_number_is_shown_or_left_out() -> None:
    """None is forgotten, and none is in both lists."""
    tests = shown()
    assert [number for number in NUMBERS if number not in tests and number not in OUT] == []
    assert sorted(tests.keys() & OUT.keys()) == []
    assert sorted(tests.keys() - set(NUMBERS) - {"R-AG-50", "E-105", "E-106"}) == []


def test_the_page_is_what_the_tests_say() -> None:
    """After a change of a docstring: ``python -m tests.elastic.coverage``."""
    assert PAGE.read_text() == table()
