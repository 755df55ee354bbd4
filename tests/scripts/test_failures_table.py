"""README.md and FAILURES.md say what the misbehaviour kit says."""

from __future__ import annotations

import sys
from pathlib import Path

from supervisor.selftest_cases import CASES

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))
from failures_table import BEGIN, END, SHOWN, cell  # noqa: E402

BY_NAME = {case.name: case for case in CASES}


def test_the_readme_shows_cases_of_the_kit_in_its_words():
    text = (ROOT / "README.md").read_text()
    rows = text[text.index(BEGIN) : text.index(END)].splitlines()[3:]
    assert len(rows) == len(SHOWN)
    for name, row in zip(SHOWN, rows, strict=True):
        assert row.startswith(f"| {cell(BY_NAME[name].title)} | {cell(BY_NAME[name].expected)} | ")


def test_the_page_of_failures_has_every_case_and_none_that_was_not_contained():
    lines = (ROOT / "FAILURES.md").read_text().splitlines()
    named = {line.split("`")[1]: line for line in lines if line.startswith("| `")}
    assert set(named) == set(BY_NAME)
    for line in named.values():
        assert line.endswith("| yes |"), line
