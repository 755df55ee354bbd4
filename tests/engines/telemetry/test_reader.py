"""The real reader's own logic against a scripted NVML; against a real one in tests/gpu."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engines.telemetry import cuda, reader

PROGRAM = Path(reader.__file__)


@pytest.fixture(autouse=True)
def no_cuda(monkeypatch):
    monkeypatch.setattr(cuda, "_load", lambda: (_ for _ in ()).throw(cuda.CudaError("libcuda.so.1 is not installed")))


def test_once_tells_versions_and_what_decides_which_libraries_fit(nvml, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", nvml.scripted())
    found = reader.read_machine()
    assert found["driver"] == "580.95.05"
    assert found["cuda_max"] == "13.0"
    assert found["gpus"] == [
        {
            "index": 0,
            "uuid": "GPU-1",
            "name": "H200",
            "memory_bytes": 24 * 2**30,
            "memory_free_bytes": 20 * 2**30,
            "compute_capability": "9.0",
        }
    ]
    assert found["cuda_error"] == "libcuda.so.1 is not installed"


def test_once_a_field_that_the_driver_hides_costs_only_that_field(nvml, monkeypatch):
    module = nvml.scripted(nvmlDeviceGetMemoryInfo=nvml.refused("NotSupported"))
    monkeypatch.setitem(sys.modules, "pynvml", module)
    (gpu,) = reader.read_machine()["gpus"]
    assert gpu["name"] == "H200"
    assert "Not Supported" in gpu["missing"]["memory_bytes"]


def test_once_a_gpu_without_a_handle_is_still_listed(nvml, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", nvml.scripted(nvmlDeviceGetHandleByIndex=nvml.refused("GpuIsLost")))
    (gpu,) = reader.read_machine()["gpus"]
    assert "GPU is lost" in gpu["missing"]["uuid"]


def test_once_no_driver_is_an_error_text(nvml, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", nvml.scripted(nvmlInit=nvml.refused("LibraryNotFound")))
    found = reader.read_machine()
    assert found["gpus"] == []
    assert "NVML Shared Library Not Found" in found["error"]
    assert found["cuda_error"]


def test_once_nvml_is_shut_down_also_when_reading_fails(nvml, monkeypatch):
    ended: list[bool] = []
    module = nvml.scripted(nvmlDeviceGetCount=nvml.refused("Unknown"), nvmlShutdown=lambda: ended.append(True))
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert "Unknown Error" in reader.read_machine()["error"]
    assert ended == [True]


def test_a_trial_looks_at_that_gpu_alone(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert reader.try_cuda("GPU-7") == {"uuid": "GPU-7", "error": "libcuda.so.1 is not installed"}
    assert reader.os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-7"


class Line:
    def __init__(self) -> None:
        self.sent: list[dict] = []

    def send(self, message) -> None:
        self.sent.append(message)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ({"nvmlInit": "LibraryNotFound"}, "NVML Shared Library Not Found"),
        ({"nvmlInit": "DriverNotLoaded"}, "Driver Not Loaded"),
        ({"nvmlDeviceGetCount": "Unknown"}, "Unknown Error"),
        ({"nvmlDeviceGetCount": None}, "NVML lists no GPU"),
    ],
)
def test_watching_nothing_is_said_once_and_over(nvml, monkeypatch, override, said):
    calls = {name: nvml.refused(error) if error else (lambda: 0) for name, error in override.items()}
    monkeypatch.setitem(sys.modules, "pynvml", nvml.scripted(**calls))
    line = Line()
    reader.watch(line, 1.0)
    (only,) = line.sent
    assert only["t"] == "none"
    assert said in only["error"]


@pytest.mark.parametrize("mode", [["--once"], ["--try-cuda", "GPU-1"], []])
def test_the_program_runs_isolated_by_its_path_and_prints_whole_lines(mode, tmp_path):
    done = subprocess.run(
        [sys.executable, "-I", str(PROGRAM), *mode],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert all(isinstance(json.loads(line), dict) for line in done.stdout.splitlines())
    assert done.stdout.endswith(b"\n")


SCRIPTED_CHILD = """
import importlib.util, sys
sys.path.insert(0, {root!r})
spec = importlib.util.spec_from_file_location("scripted", {scripted!r})
scripted = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scripted)
sys.modules["pynvml"] = scripted.scripted(nvmlEventSetCreate=scripted.refused("NotSupported"))
from engines.telemetry import reader
sys.argv = ["reader.py", "--interval", "30"]
reader.main()
"""


def test_watching_gives_a_reading_at_once_another_on_request_and_ends_with_its_input():
    root, scripted = str(PROGRAM.parents[2]), str(Path(__file__).with_name("scripted_nvml.py"))
    command = [sys.executable, "-c", SCRIPTED_CHILD.format(root=root, scripted=scripted)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        assert (first["t"], first["asked"], first["driver"]) == ("reading", 0, "580.95.05")
        assert first["gpus"][0]["uuid"] == "GPU-1"
        assert "NotSupported" in first["events"]
        process.stdin.write(b"read 5\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["asked"] == 5
        process.stdin.close()
        assert process.wait(timeout=60) == 0
