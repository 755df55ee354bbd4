from __future__ import annotations

import os

import pytest

from engines.runtime import device
from protocol.engine_wire import Model, Ready
from protocol.faults import FaultError


@pytest.mark.parametrize(
    ("asked", "devices", "visible"),
    [
        ("auto", (), "all of them"),
        ("cuda", (), "all of them"),
        ("cuda", ("GPU-a", "GPU-b"), "GPU-a,GPU-b"),
        ("auto", ("GPU-b",), "GPU-b"),
        ("cpu", (), ""),
        ("cpu", ("GPU-a",), ""),
    ],
)
def test_only_what_the_model_may_use_is_visible(
    monkeypatch: pytest.MonkeyPatch, asked: str, devices: tuple[str, ...], visible: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "all of them")
    device.prepare(Model(name="m", device=asked, devices=devices))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible


@pytest.mark.parametrize("asked", ["tpu", "cuda:1", ""])
def test_an_unknown_device_is_a_failed_load(asked: str) -> None:
    with pytest.raises(FaultError, match="is none of auto, cpu, cuda") as caught:
        device.prepare(Model(name="m", device=asked))
    assert (caught.value.fault.code, caught.value.fault.field) == ("load_failed", "device")


def test_every_engine_is_judged_by_it(spawn) -> None:
    """In the real child: the runtime judges, whatever the engine looks at."""
    fault = spawn("synthetic").load(Model(name="synthetic-x", device="tpu"))
    assert (fault.code, fault.field) == ("load_failed", "device")
    fault = spawn("synthetic").load(Model(name="synthetic-x", device="cuda"))
    assert (fault.code, fault.field) == ("cpu_fallback", "device")


def test_a_silent_fall_to_the_cpu_is_refused_with_the_cure() -> None:
    with pytest.raises(FaultError, match="asks for cuda but the library runs it on cpu") as caught:
        device.refuse_fallback(Model(name="m", device="cuda"), Ready(device="cpu"))
    assert caught.value.fault.code == "cpu_fallback"
    assert "engine-probe" in caught.value.fault.detail["hint"]
    device.refuse_fallback(Model(name="m", device="cuda"), Ready(device="cuda:0"))
    device.refuse_fallback(Model(name="m"), Ready(device="cpu"))
