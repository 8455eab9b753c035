"""Errors of others become one line of ours."""

import pytest

from launcher.errors import Failed, one_line


@pytest.mark.parametrize(
    ("said", "first", "line"),
    [
        (Failed("a\n  b\tc \n"), False, "a b c"),
        (Failed("\n  a  b \ntrace"), True, "a b"),
        (TimeoutError(), False, "TimeoutError"),
        (TimeoutError(" \n"), True, "TimeoutError"),
        ("", False, ""),
        ("x" * 20, False, "x" * 6 + " ..."),
    ],
)
def test_an_error_is_one_line_and_never_an_empty_one(said: object, first: bool, line: str) -> None:
    assert one_line(said, 10, first=first) == line
