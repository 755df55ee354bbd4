from __future__ import annotations

import logging
import mmap
import os
import sys
from pathlib import Path

import pytest

from supervisor.intake.pace import Memory
from supervisor.observe.spill import Spill, anonymous_bytes

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


def test_a_load_that_is_less_full_than_an_earlier_one_is_a_spill_when_ram_holds_the_rest() -> None:
    spill = Spill()
    spill.measured("chat", on_gpu=8 * GIB, in_ram=2 * GIB)
    assert spill.sentence("chat") == ""
    spill.gone("chat")
    spill.measured("chat", on_gpu=3 * GIB, in_ram=3 * GIB)  # a smaller context: RAM did not grow by as much
    assert spill.sentence("chat") == ""
    spill.measured("chat", on_gpu=3 * GIB, in_ram=7 * GIB)
    assert "about 5.0 GiB of the rest in the box's RAM" in spill.sentence("chat")
    spill.measured("chat", on_gpu=9 * GIB, in_ram=2 * GIB)
    assert spill.sentence("chat") == ""


def test_what_the_operator_told_is_believed_at_the_first_load() -> None:
    spill = Spill()
    spill.measured("chat", on_gpu=3 * GIB, in_ram=6 * GIB, told=8 * GIB)
    assert "holds 3.0 of 8.0 GiB" in spill.sentence("chat")
    spill = Spill()
    spill.measured("chat", on_gpu=3 * GIB, in_ram=6 * GIB)
    assert spill.sentence("chat") == "", "nothing is known of this model yet"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_counted_without_mapped_files(tmp_path: Path) -> None:
    size = 64 * 2**20
    before = anonymous_bytes([os.getpid()])
    assert before > 0
    held = bytearray(b"x") * size
    with_it = anonymous_bytes([os.getpid()])
    assert with_it - before > size * 0.9
    (tmp_path / "weights").write_bytes(held)
    with (tmp_path / "weights").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[::4096]) == ord("x") * size // 4096  # every page was touched
        assert anonymous_bytes([os.getpid()]) - with_it < size / 2
    assert anonymous_bytes([2**30]) == 0
