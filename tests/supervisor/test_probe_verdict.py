"""Verdicts and hints as tables: what the child left behind -> what people are told."""

from __future__ import annotations

from typing import Any

import pytest

from supervisor.host.child import Exit
from supervisor.machine.gpu import Gpu, Machine
from supervisor.probe_verdict import SHARED_OBJECTS, Climb, Probe, judge, summary

WELL = Exit(code=0)
IMPORT = {"rung": "import"}
CLAIMS = {"rung": "claims", "claims": {"versions": {"onnxruntime": "1.31.1"}}, "licence": "MIT", "kinds": ["image"]}
LOAD = {"rung": "load"}
GPU = Machine(driver="535.54", cuda_max="12.2", gpus=(Gpu(index=0),))


def infer(device: str) -> dict[str, Any]:
    return {"rung": "infer", "ready": {"device": device, "compute_type": "float32"}, "load_ms": 3.0}


def answer(wrong: str = "") -> dict[str, Any]:
    return {"rung": "answer", "wrong": wrong, "infer_ms": 5.0, "rss_bytes": 1000}


def fault(message: str, code: str = "load_failed") -> dict[str, Any]:
    return {"rung": "fault", "fault": {"code": code, "message": message}}


def judged(*rungs: dict[str, Any], how: Exit = WELL, device: str = "cpu", **fields: Any) -> Probe:
    machine = fields.pop("machine", None)
    name, backend = fields.pop("name", "image"), fields.pop("backend", "")
    climb = Climb(rungs=rungs, how=how, stderr=tuple(fields.pop("stderr", ())), **fields)
    return judge(name, backend, device, "/venv/bin/python", climb, machine)


@pytest.mark.parametrize(
    ("rungs", "options", "verdict", "said"),
    [
        ((IMPORT, CLAIMS, LOAD, infer("cpu"), answer()), {}, "ok", ""),
        ((IMPORT, CLAIMS, LOAD, infer("cuda:0"), answer()), {"device": "cuda"}, "ok", ""),
        ((IMPORT, CLAIMS, LOAD, infer("cpu"), answer()), {"device": "cuda"}, "cpu-fallback", "ran on cpu"),
        ((IMPORT, CLAIMS, LOAD, infer("cuda:0"), answer()), {"device": "cuda", "held": {"GPU-a": 1}}, "ok", ""),
        ((IMPORT, CLAIMS, LOAD, infer("cuda:0"), answer()), {"device": "cuda", "held": {}, "unknown": "No."}, "ok", ""),
        (
            (IMPORT, CLAIMS, LOAD, infer("cuda:0"), answer()),
            {"device": "cuda", "held": {}},
            "cpu-fallback",
            "no memory",
        ),
        (
            (IMPORT, CLAIMS, LOAD, infer("cuda:0"), answer("it is blue")),
            {"device": "cuda", "held": {}},
            "failed",
            "blue",
        ),
        ((IMPORT, CLAIMS, LOAD, infer("cpu"), answer("it is blue")), {}, "failed", "it is blue"),
        ((IMPORT, CLAIMS, LOAD, infer("cpu"), answer()), {"how": Exit(signal=11)}, "ok", ""),
        ((IMPORT,), {"how": Exit(signal=11)}, "crashed(SIGSEGV)", "importing"),
        ((IMPORT, CLAIMS, LOAD), {"how": Exit(signal=6)}, "crashed(SIGABRT)", "loading"),
        ((IMPORT, CLAIMS, LOAD, infer("cpu")), {"how": Exit(signal=9)}, "crashed(SIGKILL)", "answering"),
        ((IMPORT, CLAIMS, LOAD), {"how": Exit(code=1), "stderr": ["espeak: no data"]}, "failed", "espeak: no data"),
        ((IMPORT, CLAIMS, LOAD), {"how": Exit(signal=15), "hung": True}, "hung", "30 s while loading"),
        ((), {"how": Exit(), "hung": True}, "hung", "starting"),
        ((IMPORT, fault("No module named 'x'", "not_installed")), {}, "not-installed", "No module named 'x'"),
        ((IMPORT, fault("it runs on cpu", "cpu_fallback")), {"device": "cuda"}, "cpu-fallback", "it runs on cpu"),
        ((IMPORT, fault("bad file")), {}, "failed", "bad file"),
        ((), {"how": Exit(code=1), "stderr": ["No module named 'msgspec'"]}, "not-installed", "no msgspec"),
        ((), {"how": Exit(code=127)}, "failed", "exit code 127 while starting"),
    ],
)
def test_verdicts(rungs: tuple[dict[str, Any], ...], options: dict[str, Any], verdict: str, said: str):
    probe = judged(*rungs, **options)
    assert probe.verdict == verdict
    assert said in probe.message
    assert (probe.hint == "") == (verdict == "ok")


@pytest.mark.parametrize(
    ("probe", "said"),
    [
        (judged(fault("No module named 'xllamacpp'", "not_installed"), name="llm", backend="xllamacpp"), "[llm]"),
        (judged(fault("No module named 'piper'", "not_installed"), name="piper"), "[tts]"),
        (judged(fault("No module named 'their'", "not_installed"), name="their"), "into /venv/bin/python"),
        (judged(how=Exit(code=1), stderr=["No module named 'msgspec'"]), "pip install msgspec"),
        (judged(fault("Library libcublas.so.12 is not found or cannot be loaded")), "pip install nvidia-cublas-cu12"),
        (judged(fault("libcudnn.so.9: cannot open shared object file"), device="cuda"), "nvidia-cudnn-cu12"),
        (judged(fault("libcuda.so.1: cannot open shared object file")), "driver is not installed"),
        (judged(fault("libgomp.so.1: cannot open shared object file"), name="llm"), "apt-get install libgomp1"),
        (judged(fault("libodd.so.3: cannot open shared object file")), "libodd.so.3 is missing"),
        (judged(fault("x"), device="cuda", machine=Machine(error="no NVML")), "No NVIDIA GPU was found here (no NVML)"),
        (
            judged(fault("x"), device="cuda", machine=Machine(gpus=(Gpu(index=0),), cuda_error="cuInit failed")),
            "nvidia-uvm",
        ),
        (
            judged(fault("CUDA driver version is insufficient for CUDA runtime"), device="cuda", machine=GPU),
            "The driver 535.54 serves CUDA 12.2",
        ),
        (judged(fault("CUDA out of memory"), device="cuda", machine=GPU), "The GPU is full"),
        (judged(CLAIMS, infer("cpu"), answer(), device="cuda", machine=GPU), "CPU build of onnxruntime"),
        (judged(fault("std::bad_alloc")), "ran out of memory"),
        (judged(IMPORT, how=Exit(signal=4)), "compiled for another CPU"),
        (judged(IMPORT, how=Exit(signal=9)), "dmesg"),
        (judged(IMPORT, hung=True, how=Exit(signal=9)), "--deadline"),
    ],
)
def test_hints_name_the_cure(probe: Probe, said: str):
    assert said in probe.hint


def test_what_the_driver_said_is_told():
    rungs = (IMPORT, CLAIMS, LOAD, infer("cuda:0"), answer())
    assert judged(*rungs, device="cuda", held={"GPU-a": 5}).held_bytes == {"GPU-a": 5}
    unsure = judged(*rungs, device="cuda", held={}, unknown="Pids are hidden here.")
    assert unsure.notes == ("That it ran on the GPU is its own word. Pids are hidden here.",)
    assert judged(*rungs, device="cuda").notes == ()


def test_a_llama_fallback_speaks_of_building():
    claims = {"rung": "claims", "claims": {"versions": {"xllamacpp": "1"}}, "licence": "MIT", "kinds": ["llm"]}
    assert "CPU build; build it with CUDA" in judged(claims, infer("cpu"), answer(), device="cuda", machine=GPU).hint


def test_an_import_error_of_a_shared_object_is_not_a_missing_package():
    probe = judged(IMPORT, fault("libcublas.so.12: cannot open shared object file", "not_installed"))
    assert probe.verdict == "failed"


def test_every_known_library_maps_to_the_package_of_its_cuda_major():
    for library, package in SHARED_OBJECTS.items():
        assert package.startswith("nvidia-"), library


def test_the_licence_comes_from_the_catalogue_when_the_engine_could_not_tell():
    assert "GPL" in judged(IMPORT, fault("No module named 'piper'", "not_installed"), name="piper").licence


def test_stderr_is_kept_only_as_evidence():
    assert judged(IMPORT, CLAIMS, LOAD, infer("cpu"), answer(), stderr=["chatter"]).stderr == ()
    assert judged(IMPORT, how=Exit(code=1), stderr=["why"]).stderr == ("why",)


def test_the_summary_counts():
    assert summary([]) == "nothing to probe"
    assert summary([judged(fault("x")), judged(fault("x"))]) == "2 failed"
