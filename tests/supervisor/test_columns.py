"""Text tables."""

from __future__ import annotations

from supervisor.columns import columns, width


def test_columns_line_up_left_and_right():
    assert columns(("a", "n"), [("long", "1"), ("b", "100")], right=(1,)) == "a       n\nlong    1\nb     100"


def test_wide_and_combining_characters_count_as_cells():
    assert width("日本") == 4
    assert width("é") == 1
    assert width("plain") == 5


def test_no_rows_leave_the_head():
    assert columns(("a", "b"), []) == "a  b"
