from __future__ import annotations

import logging

import pytest

from supervisor.intake.pace import Memory
from supervisor.observe.spill import Spill

GIB = 2**30
WELL = Memory(expected=8 * GIB, on_gpu=8 * GIB, in_ram=GIB, usual_ram=GIB)
SPILT = Memory(expected=8 * GIB, on_gpu=3 * GIB, in_ram=6 * GIB, usual_ram=GIB)


def test_a_spill_is_told_once_a_load_shown_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "supervisor")
    counts: list[tuple[str, int]] = []
    spill = Spill(lambda model, count: counts.append((model, count)))
    spill.seen("chat", WELL)
    assert (spill.sentence("chat"), caplog.messages) == ("", [])
    for _ in range(3):
        spill.seen("chat", SPILT)
    assert spill.sentence("chat").startswith("chat holds 3.0 of 8.0 GiB on the GPU")
    assert caplog.messages == [spill.sentence("chat")]
    assert caplog.records[0].levelno == logging.WARNING
    spill.gone("chat")
    assert spill.sentence("chat") == ""
    spill.seen("chat", SPILT)
    assert len(caplog.messages) == 2, "the next load is told about anew"
    spill.seen("chat", WELL)
    assert caplog.messages[2:] == ["chat lies on the GPU again"]
    assert counts == [("chat", n) for n in (0, *[5 * GIB] * 3, 0, 5 * GIB, 0)]
