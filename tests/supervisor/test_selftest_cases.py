"""The kit as data: whole, stable, and in step with the engine that it is about."""

from __future__ import annotations

import re

import pytest

from engines.synthetic.misbehave import AT_LOAD, AT_START, MISDEEDS
from protocol.faults import CODES
from supervisor.selftest_cases import CASES, Case


def word(text: str) -> str:
    return text.partition(":")[0]


def test_every_misdeed_of_the_engine_has_a_case():
    assert {word(case.prompt) for case in CASES if case.prompt} == {*MISDEEDS}
    assert {word(case.load) for case in CASES if case.load} == {*AT_LOAD}
    assert {word(case.start) for case in CASES if case.start} == {*AT_START}


def test_every_wrong_frame_has_a_case():
    from pathlib import Path

    source = Path(__file__).parents[2] / "engines" / "synthetic" / "misdeeds_wire.py"
    kinds = re.findall(r'^        "(\w+)": lambda:', source.read_text(), re.MULTILINE)
    assert len(kinds) >= 13
    assert {f"frame:{kind}" for kind in kinds} == {case.prompt for case in CASES if case.prompt.startswith("frame:")}


def test_names_are_unique_and_plain():
    names = [case.name for case in CASES]
    assert len({*names}) == len(names)
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in names)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_says_what_it_does_and_what_must_come_of_it(case: Case):
    assert case.group
    assert case.title
    assert case.title[0].islower()  # "the engine …"
    assert case.expected.endswith(".")
    assert sum(map(bool, (case.prompt, case.load, case.start))) == 1
    assert case.answer is not None or case.codes, "nothing would be right"
    assert {*case.codes} <= {*CODES}
    assert case.within_s < 20  # the whole kit has four minutes


def test_limits_are_short_and_a_case_may_set_its_own():
    by_name = {case.name: case.limits for case in CASES}
    assert all(limits.stall_s <= 1 and limits.term_grace_s <= 1 for limits in by_name.values())
    assert by_name["start-hang"].start_s < by_name["hang"].start_s
    assert by_name["disk"].scratch_gb * 1024 == pytest.approx(100)
    assert by_name["leak"].recycle.rss_growth_gb * 1024 == pytest.approx(150)
    assert by_name["hang"].recycle.rss_growth_gb == 0
