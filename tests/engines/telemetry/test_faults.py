"""The driver's events against a scripted NVML."""

from __future__ import annotations

import queue
import threading
from typing import Any

import pynvml as real
import pytest

from engines.telemetry.faults import Faults


def with_events(nvml, *script: Any, supported=0xFFFF):
    """A scripted NVML whose waits answer with `script`, then never again."""
    left = list(script)
    registered: list[int] = []

    def wait(_set, _timeout_ms):
        if not left:
            threading.Event().wait()  # a daemon thread may wait for ever
        answer = left.pop(0)
        if isinstance(answer, type):
            raise answer
        return answer

    module = nvml.scripted(
        nvmlEventSetCreate=lambda: "set",
        nvmlDeviceGetSupportedEventTypes=lambda handle: supported,
        nvmlDeviceRegisterEvents=lambda handle, types, events: registered.append(types),
        nvmlEventSetWait_v2=wait,
    )
    return module, registered


def event(nvml, kind: int, data: int = 0):
    return nvml.some(device="handle-0", eventType=kind, eventData=data)


def heard(nvml, *script: Any, count: int = 1, **more: Any):
    module, _registered = with_events(nvml, *script, **more)
    lines: queue.Queue = queue.Queue()
    faults = Faults(module, [("GPU-1", "handle-0")])
    faults.start(lines.put)
    return [lines.get(timeout=60) for _ in range(count)]


def test_an_xid_is_a_line_with_its_number(nvml):
    assert heard(nvml, event(nvml, 0x8, 79)) == [{"t": "event", "kind": "xid", "uuid": "GPU-1", "xid": 79}]


@pytest.mark.parametrize(
    ("number", "kind"),
    [(0x2, "ecc-double-bit"), (0x800, "retirement-failure"), (0x2000, "poison-fatal"), (0x4000, "unavailable")],
)
def test_other_events_have_names(nvml, number, kind):
    assert heard(nvml, event(nvml, number)) == [{"t": "event", "kind": kind, "uuid": "GPU-1"}]


def test_an_event_without_a_name_is_told_by_number(nvml):
    (line,) = heard(nvml, event(nvml, 0x40000))
    assert line["kind"] == "event-0x40000"


def test_a_changed_recovery_action_brings_the_action(nvml):
    module, _ = with_events(nvml)
    module.nvmlDeviceGetFieldValues = lambda handle, ids: [nvml.some(nvmlReturn=0, value=nvml.some(uiVal=2))]
    line = Faults(module, [("GPU-1", "handle-0")]).describe(event(nvml, 0x8000))
    assert line == {"t": "event", "kind": "recovery-action", "uuid": "GPU-1", "action": "reboot"}


def test_silence_and_failed_waits_end_nothing(nvml, monkeypatch):
    monkeypatch.setattr("engines.telemetry.faults.PAUSE_S", 0.001)
    lines = heard(nvml, real.NVMLError_Timeout, real.NVMLError_Unknown, event(nvml, 0x8, 31))
    assert lines[0]["xid"] == 31


def test_a_lost_gpu_is_told_once_however_many_waits_fail(nvml, monkeypatch):
    monkeypatch.setattr("engines.telemetry.faults.PAUSE_S", 0.001)
    lost = real.NVMLError_GpuIsLost
    first, second = heard(nvml, lost, lost, lost, event(nvml, 0x8, 79), count=2)
    assert first["kind"] == "lost"
    assert second["xid"] == 79


def test_only_what_the_driver_knows_is_registered(nvml):
    module, registered = with_events(nvml, supported=0x8 | 0x1)
    Faults(module, [("GPU-1", "handle-0")]).start(lambda _line: None)
    assert registered == [0x8]


@pytest.mark.parametrize("call", ["nvmlEventSetCreate", "nvmlDeviceGetSupportedEventTypes"])
def test_a_driver_without_events_says_why_and_starts_no_thread(nvml, call):
    module, _ = with_events(nvml)
    setattr(module, call, nvml.refused("NotSupported"))
    faults = Faults(module, [("GPU-1", "handle-0")])
    faults.start(lambda _line: None)
    assert "NotSupported" in faults.missing


def test_a_driver_that_knows_none_of_ours_is_told(nvml):
    module, _ = with_events(nvml, supported=0)
    faults = Faults(module, [("GPU-1", "handle-0")])
    faults.start(lambda _line: None)
    assert faults.missing == "no GPU reports events"


def test_a_device_that_cannot_tell_its_uuid_any_more_is_the_only_one(nvml):
    module, _ = with_events(nvml)
    module.nvmlDeviceGetUUID = nvml.refused("GpuIsLost")
    assert Faults(module, [("GPU-1", "handle-0")]).describe(event(nvml, 0x8, 79))["uuid"] == "GPU-1"
    assert Faults(module, [("GPU-1", "a"), ("GPU-2", "b")]).describe(event(nvml, 0x8, 79))["uuid"] == ""
