"""Lines of a reader as data, and sums over them."""

from __future__ import annotations

import msgspec
import pytest

from supervisor.machine import readings as data
from supervisor.machine.readings import GpuEvent, GpuProcess, GpuReading, MigDevice, NoGpu, Reading

LINES = [
    (b'{"t": "reading", "asked": 2, "driver": "580", "gpus": [{"uuid": "GPU-1", "from_the_future": 1}]}',
     Reading(asked=2, driver="580", gpus=(GpuReading(uuid="GPU-1"),))),
    (b'{"t": "reading"}', Reading()),
    (b'{"t": "event", "kind": "xid", "uuid": "GPU-1", "xid": 79}', GpuEvent(kind="xid", uuid="GPU-1", xid=79)),
    (b'{"t": "none", "error": "no driver"}', NoGpu(error="no driver")),
]  # fmt: skip


@pytest.mark.parametrize(("line", "spoken"), LINES)
def test_lines_are_told_apart_by_their_tag(line, spoken):
    assert data.decode(line) == spoken
    assert data.decode(msgspec.json.encode(spoken)) == spoken


@pytest.mark.parametrize(
    "line", [b"", b"{}", b"[]", b'{"t": "x"}', b'{"t": "event"}', b'{"t": "reading", "gpus": {}}', b"\xff"]
)
def test_anything_else_is_refused(line):
    with pytest.raises((msgspec.MsgspecError, UnicodeDecodeError)):
        data.decode(line)


def gpu(**fields: object) -> GpuReading:
    held = (GpuProcess(pid=1, bytes=10), GpuProcess(pid=2, bytes=20), GpuProcess(pid=3))
    return GpuReading(uuid="GPU-1", memory_used_bytes=50, processes=held, **fields)


PART = MigDevice(uuid="MIG-1", memory_used_bytes=9, processes=(GpuProcess(pid=1, bytes=9),))


@pytest.mark.parametrize(
    ("pids", "held"), [([1], {"GPU-1": 10, "MIG-1": 9}), ([1, 2, 3], {"GPU-1": 30, "MIG-1": 9}), ([3], {}), ([], {})]
)
def test_what_processes_hold_is_summed_by_device(pids, held):
    assert data.used_by({"GPU-1": gpu(mig=(PART,))}, pids) == held


@pytest.mark.parametrize(
    ("pids", "believed", "foreign"),
    [([], 0, 50), ([1, 2], 0, 20), ([1], 25, 25), ([1, 2], 25, 20), ([], 80, 0)],
)
def test_foreign_is_what_is_not_ours(pids, believed, foreign):
    assert data.foreign_bytes(gpu(), pids, believed) == foreign


def test_foreign_is_unknown_when_used_is():
    assert data.foreign_bytes(GpuReading(uuid="GPU-1"), []) is None


def test_parts_are_devices_too():
    readings = {"GPU-1": gpu(mig=(PART,))}
    assert data.device(readings, "MIG-1") is PART
    assert data.device(readings, "GPU-1") is readings["GPU-1"]
    assert data.device(readings, "GPU-2") is None


def test_idling_is_no_throttling():
    assert GpuReading(clock_reasons=("gpu-idle", "clocks-setting", "sw-power-cap")).throttled == ("sw-power-cap",)
