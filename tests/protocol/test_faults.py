"""Faults: one table says whose they are; the data crosses every wire unchanged."""

from __future__ import annotations

import msgspec
import pytest

from protocol.faults import CODES, Fault, FaultError, Owner, refuse


@pytest.mark.parametrize("code", CODES)
def test_every_code_makes_an_answer(code):
    fault = Fault(code, "A sentence.", field="f")
    row = CODES[code]
    assert (fault.owner, fault.may_retry, fault.http_status) == (row.owner, row.retryable, row.http_status)
    error = fault.openai_error()["error"]
    assert (error["message"], error["param"], error["code"], error["type"]) == (
        "A sentence.",
        "f",
        code,
        row.openai_type,
    )
    assert (400 <= row.http_status < 500) == (row.owner is Owner.CALLER)


def test_the_callers_mistakes_are_not_tried_again_but_for_the_rate():
    assert [code for code, row in CODES.items() if row.owner is Owner.CALLER and row.retryable] == ["rate_limited"]


def test_one_fault_may_overrule_the_table():
    assert Fault("command_failed", "m", retryable=True).may_retry
    assert not Fault("engine_crashed", "m", retryable=False).may_retry


def test_an_unknown_code_of_a_newer_peer_is_kept_and_treated_as_an_engine_failure():
    fault = Fault("brand_new", "m")
    assert (fault.code, fault.info, fault.openai_error()["error"]["code"]) == (
        "brand_new",
        CODES["engine_failed"],
        "brand_new",
    )


def test_it_crosses_the_wires_unchanged():
    fault = Fault("engine_crashed", "m", field="f", retryable=False, detail={"signal": 11, "stderr_tail": ["x"]})
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(fault), type=Fault) == fault
    assert msgspec.json.decode(msgspec.json.encode(fault), type=Fault) == fault


def test_refuse_builds_the_exception():
    error = refuse("invalid_parameter", "m", "f", limit=3)
    assert isinstance(error, FaultError)
    assert error.fault == Fault("invalid_parameter", "m", field="f", detail={"limit": 3})
    assert str(error) == "m"
