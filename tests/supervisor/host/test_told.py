"""What an engine tells is bounded and plain before it goes on."""

from __future__ import annotations

import math

import pytest

from protocol.faults import CODES, Fault, Owner
from supervisor.host import told


@pytest.mark.parametrize(
    ("said", "passed"),
    [
        ("plain words", "plain words"),
        ("a\x1b[2Jb\x00c\nd", "a [2Jb c d"),
        ("right\u202eleft", "right left"),
        ("ü" * 3000, "ü" * told.MAX_MESSAGE_CHARS + "…"),
        ("", ""),
    ],
)
def test_text(said: str, passed: str):
    assert told.text(said) == passed


@pytest.mark.parametrize("code", [code for code, info in CODES.items() if info.owner in (Owner.CALLER, Owner.ENGINE)])
def test_an_engine_may_blame_the_caller_or_itself(code: str):
    assert told.fault(Fault(code, "So it is.")).code == code


@pytest.mark.parametrize(
    "code",
    [*(code for code, info in CODES.items() if info.owner in (Owner.WORKER, Owner.COORDINATOR)), "", "\x1b[2J", "A B"],
)
def test_an_engine_may_blame_nobody_else(code: str):
    fault = told.fault(Fault(code, "It was them."))
    assert fault.code == "engine_failed"
    assert set(fault.detail) == {"code"}
    assert fault.detail["code"].isprintable()


def test_a_code_of_a_newer_engine_is_kept():
    assert told.fault(Fault("speaker_unknown", "Who?")).code == "speaker_unknown"


def test_what_only_we_conclude_is_taken_out_of_the_detail():
    detail = {"alone": True, "suspects": 9, "end": "asked", "hint": "stays"}
    assert told.fault(Fault("engine_failed", "x", detail=detail)).detail == {"hint": "stays"}


def test_detail_is_bounded():
    fault = told.fault(Fault("engine_failed", "x", field="f" * 999, detail={"much": "x" * 10**6}))
    assert list(fault.detail) == ["hint"]
    assert len(fault.field or "") == told.MAX_NAME_CHARS + 1


def test_usage_is_what_can_be_added_up():
    said = {"tokens": 3.0, "nan": math.nan, "more": math.inf, "less": -1.0, "x" * 999: 1.0, "a\nb": 1.0, "none": 0.0}
    assert told.usage(said) == {"tokens": 3.0, "none": 0.0}
    assert len(told.usage({f"k{n}": 1.0 for n in range(1000)})) == told.MAX_USAGE_KEYS


def test_log_lines_are_let_through_at_a_bounded_rate_and_the_rest_is_counted():
    now = 0.0
    gate = told.LogGate(lambda: now)
    admitted = [gate.admit() for _ in range(int(told.LINES_AT_ONCE) + 100)]
    assert admitted.count(0) == told.LINES_AT_ONCE
    assert admitted[-1] is None
    now = 1.0
    assert gate.admit() == 100
    assert gate.admit() == 0
