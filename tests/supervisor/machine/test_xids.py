"""The table of Xids."""

from __future__ import annotations

import pytest

from supervisor.machine.xids import UNKNOWN, XIDS, Action, Owner, xid

# Fatal for the GPU, and what cures it, as NVIDIA's catalog has it (48 and 74 by their text).
FATAL = {
    46: "reset-gpu", 48: "reset-gpu", 62: "reset-gpu", 64: "reset-gpu", 74: "reset-gpu", 79: "reboot", 95: "reset-gpu",
    109: "reset-gpu", 110: "reset-gpu", 119: "reset-gpu", 120: "reset-gpu", 136: "reset-gpu", 140: "reset-gpu",
    143: "reset-gpu", 155: "reset-gpu", 156: "reset-gpu", 158: "reset-gpu",
}  # fmt: skip
APPLICATION = (11, 13, 25, 31, 43, 45, 68, 69, 80, 137)
HARMLESS = (14, 37, 38, 43, 44, 45, 63, 66, 67, 92, 93, 106, 121, 141, 154)


@pytest.mark.parametrize(("number", "action"), FATAL.items())
def test_fatal_ones_take_the_gpu_out_of_service(number, action):
    assert xid(number).fatal
    assert xid(number).action == action
    assert xid(number).owner is not Owner.APPLICATION


@pytest.mark.parametrize("number", APPLICATION)
def test_faults_of_programs_are_theirs(number):
    assert xid(number).owner is Owner.APPLICATION
    assert not xid(number).fatal


@pytest.mark.parametrize("number", HARMLESS)
def test_harmless_ones_ask_for_nothing(number):
    assert xid(number).action is Action.IGNORE


def test_a_contained_memory_error_costs_the_application_only():
    assert xid(94).action is Action.RESTART_APP
    assert xid(94).owner is Owner.DEVICE


def test_one_that_nobody_knows_is_no_reason_to_give_up_a_gpu():
    assert xid(9999) is UNKNOWN
    assert not UNKNOWN.fatal


def test_every_line_is_complete():
    assert all(line.name and line.owner and line.action for line in XIDS.values())
