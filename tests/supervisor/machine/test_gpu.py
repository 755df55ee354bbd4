"""The GPU reader from the supervisor's side: real children, canned and real."""

from __future__ import annotations

import json
import sys

import pytest
import trio

from supervisor.machine.gpu import Machine, read_machine, try_gpu, wait_for_gpu

H200 = {
    "os": "linux",
    "arch": "x86_64",
    "driver": "580.95.05",
    "cuda_max": "13.0",
    "cuda_error": "",
    "gpus": [{"index": 0, "uuid": "GPU-1", "name": "H200", "memory_bytes": 150_000_000_000}],
}


def saying(text: str, *, then: str = "") -> tuple[str, ...]:
    return (sys.executable, "-c", f"print({text!r}, flush=True)\n{then}")


async def test_the_real_reader_answers_on_every_machine():
    machine = await read_machine()
    assert machine.os == sys.platform
    assert machine.gpus or machine.error, "without a GPU the reader says why"
    assert machine.usable == (bool(machine.gpus) and not machine.cuda_error)


@pytest.mark.gpu
def test_the_real_reader_sees_the_gpu():
    machine = trio.run(read_machine)
    if not machine.gpus:
        pytest.skip(f"no GPU: {machine.error}")
    assert machine.usable, machine.cuda_error
    assert machine.driver
    assert machine.cuda_max
    assert all(gpu.uuid.startswith("GPU-") and gpu.memory_bytes > 0 for gpu in machine.gpus)


async def test_a_reading_becomes_a_machine():
    machine = await read_machine(argv=saying(json.dumps(H200)))
    assert machine.usable
    assert machine.gpus[0].name == "H200"
    assert machine.cuda_max == "13.0"


async def test_nvml_without_cuda_is_not_usable():
    machine = await read_machine(argv=saying(json.dumps(H200 | {"cuda_error": "cuInit failed: 999"})))
    assert machine.gpus
    assert not machine.usable


async def test_a_hung_driver_is_told_and_the_child_is_ended():
    with trio.fail_after(20):
        machine = await read_machine(argv=(sys.executable, "-c", "while True: pass"), deadline_s=0.3)
    assert "no answer within 0.3 s" in machine.error
    assert not machine.usable


async def test_a_reader_that_breaks_is_told_with_its_last_words():
    machine = await read_machine(argv=(sys.executable, "-c", "raise SystemExit('driver exploded')"))
    assert "driver exploded" in machine.error
    assert "exit code 1" in machine.error


async def test_waiting_ends_when_the_gpu_answers(tmp_path, monkeypatch):
    monkeypatch.setattr("supervisor.machine.gpu.POLL_S", 0.01)
    flag = tmp_path / "asked"
    program = (
        "import json, os\n"
        f"seen = os.path.exists({str(flag)!r})\n"
        f"open({str(flag)!r}, 'w').close()\n"
        f"print(json.dumps({H200!r} if seen else {{'gpus': [], 'error': 'late'}}))"
    )
    with trio.fail_after(20):
        machine = await wait_for_gpu(15, argv=(sys.executable, "-c", program))
    assert machine.usable


async def test_waiting_ends_with_the_last_reading_when_no_gpu_comes(monkeypatch):
    monkeypatch.setattr("supervisor.machine.gpu.POLL_S", 0.01)
    machine = await wait_for_gpu(1.0, argv=saying(json.dumps({"gpus": [], "error": "no driver", "cuda_error": "x"})))
    assert machine.error == "no driver"


def test_no_gpu_is_a_value():
    assert not Machine().usable


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (saying('{"uuid": "GPU-1", "error": ""}'), ""),
        (saying('{"uuid": "GPU-1", "error": "cuInit failed: CUDA_ERROR_UNKNOWN (999)"}'), "CUDA_ERROR_UNKNOWN"),
        ((sys.executable, "-c", "raise SystemExit('driver exploded')"), "driver exploded"),
        ((sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"), "SIGSEGV"),
        (saying("nonsense"), "ended with exit code 0"),
    ],
)
async def test_a_trial_of_a_gpu_tells_why_it_failed(program, said):
    error, stuck = await try_gpu("GPU-1", argv=program)
    assert said in error
    assert bool(error) == bool(said)
    assert stuck == 0


async def test_a_trial_that_hangs_is_ended():
    with trio.fail_after(20):
        error, stuck = await try_gpu("GPU-1", argv=(sys.executable, "-c", "while True: pass"), deadline_s=0.3)
    assert "no answer within 0.3 s" in error
    assert stuck == 0


async def test_the_real_trial_says_what_is_missing_here():
    error, _stuck = await try_gpu("GPU-of-nobody")
    assert "libcuda" in error or "cu" in error
