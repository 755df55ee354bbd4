from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from engines.runtime.contract import CancelledRun
from protocol.faults import FaultError

pytestmark = pytest.mark.engine
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

import numpy as np  # noqa: E402

from engines.runtime import ort  # noqa: E402

ENGINES = Path(__file__).parents[3] / "engines"
EMBED = ENGINES / "embed" / "fixture" / "tiny-embed-onnx" / "onnx" / "model.onnx"
HANG = ENGINES / "image" / "fixture" / "hang.onnx"


def feeds(*ids: int) -> dict[str, Any]:
    row = np.array([ids], np.int64)
    return {"input_ids": row, "attention_mask": np.ones_like(row), "token_type_ids": np.zeros_like(row)}


def hang_feeds(session: ort.Session) -> dict[str, Any]:
    return {name: np.zeros(port.shape, port.dtype) for name, port in session.inputs.items()}


def test_a_session_knows_its_ports_and_where_it_runs() -> None:
    session = ort.open_session(EMBED, "cpu", threads=1)
    assert session.device == "cpu"
    assert session.inputs["input_ids"] == ort.Port("input_ids", ("batch", "seq"), "int64")
    assert session.outputs["last_hidden_state"].dtype == "float32"
    assert set(session.placement) <= {ort.CPU}
    (states,) = session.run(["last_hidden_state"], feeds(2, 5, 3))
    assert states.shape == (1, 3, 64)


def test_all_outputs_come_without_names() -> None:
    assert len(ort.open_session(EMBED, "cpu").run(None, feeds(2))) == 1


@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_the_executed_device_is_told_and_not_the_asked_one(device: str) -> None:
    session = ort.open_session(EMBED, device)
    if "cuda" not in ort.claimed_devices():
        assert session.device == "cpu"
    else:
        assert session.device == ("cuda:0" if session.placement.get(ort.CUDA) else "cpu")


@pytest.mark.gpu
def test_cuda_runs_nodes_on_the_gpu() -> None:
    if "cuda" not in ort.claimed_devices():
        pytest.skip("this onnxruntime was built without CUDA")
    session = ort.open_session(EMBED, "cuda")
    assert session.device == "cuda:0"
    (states,) = session.run(None, feeds(2, 5, 3))
    (expected,) = ort.open_session(EMBED, "cpu").run(None, feeds(2, 5, 3))
    assert np.abs(states - expected).max() < 1e-4


@pytest.mark.parametrize(
    "data", [b"", b"not a graph" * 10, None, EMBED.read_bytes()[:3000]], ids=lambda d: repr(d)[:12]
)
def test_a_bad_file_is_a_failed_load(tmp_path: Path, data: bytes | None) -> None:
    path = tmp_path / "bad.onnx"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(FaultError) as caught:
        ort.open_session(path, "cpu")
    fault = caught.value.fault
    assert (fault.code, fault.field) == ("load_failed", "files.model")
    assert "ONNXRuntimeError" not in fault.message


def test_a_bad_input_is_a_fault_and_the_next_run_works() -> None:
    session = ort.open_session(EMBED, "cpu")
    with pytest.raises(FaultError) as caught:
        session.run(None, feeds(999_999))
    assert caught.value.fault.code == "engine_failed"
    assert session.run(None, feeds(2))[0].shape == (1, 1, 64)


def test_terminate_ends_a_run_that_never_would() -> None:
    session = ort.open_session(HANG, "cpu")
    terminator = ort.Terminator()
    ends: list[BaseException] = []

    def work() -> None:
        try:
            session.run(None, hang_feeds(session), terminator)
        except BaseException as error:
            ends.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert not terminator.terminated
    terminator.terminate()
    thread.join(10)
    assert [type(error) for error in ends] == [CancelledRun]


def test_a_run_that_begins_after_terminate_ends_at_once() -> None:
    session = ort.open_session(HANG, "cpu")
    terminator = ort.Terminator()
    terminator.terminate()
    with pytest.raises(CancelledRun):
        session.run(None, hang_feeds(session), terminator)


def test_another_job_of_the_session_goes_on() -> None:
    session = ort.open_session(EMBED, "cpu")
    stopped = ort.Terminator()
    stopped.terminate()
    with pytest.raises(CancelledRun):
        session.run(None, feeds(2), stopped)
    assert session.run(None, feeds(2), ort.Terminator())[0].shape == (1, 1, 64)


def test_version_is_told() -> None:
    assert ort.version()[0].isdigit()
