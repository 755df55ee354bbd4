"""What the doctor looks at around the engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from supervisor import doctor_engines
from supervisor.config import build_models, load
from supervisor.doctor import Finding, Patient
from supervisor.machine import telemetry
from supervisor.probe_verdict import Probe
from supervisor.proving import circumstances_of

CHAT = Path(__file__).parents[2] / "engines" / "llm" / "fixture" / "chat-q8_0.gguf"


def patient(folder: Path, text: str, **more: Any) -> Patient:
    (folder / "worker.toml").write_text(text)
    return Patient(folder / "worker.toml", load(folder / "worker.toml", {}), folder)._replace(**more)


def by_name(findings: Any) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


SYNTHETIC = '[[models]]\nname = "synthetic"\nengine = "synthetic"\n'


def test_an_engine_is_well_when_its_probe_holds(tmp_path):
    who = patient(tmp_path, SYNTHETIC)
    assert by_name(doctor_engines.engines(who))["engine synthetic"].verdict == "warn"
    (spec,) = build_models(who.settings)
    key = "/".join((spec.engine.name, spec.model.backend, spec.model.device))
    (tmp_path / "verdicts.json").write_text(json.dumps({key: circumstances_of(spec.engine)}))
    assert by_name(doctor_engines.engines(who))["engine synthetic"].verdict == "ok"
    (tmp_path / "verdicts.json").write_text(json.dumps({key: "of another day"}))
    assert by_name(doctor_engines.engines(who))["engine synthetic"].verdict == "warn"


def test_an_interpreter_that_is_gone(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    who = patient(tmp_path, f'[engines.synthetic]\npython = "{python}"\n{SYNTHETIC}')
    python.unlink()
    gone = by_name(doctor_engines.engines(who))["engine synthetic"]
    assert (gone.verdict, str(python) in gone.sentence) == ("fail", True)


def test_models_are_looked_at_without_reading_them(tmp_path):
    file = tmp_path / "chat.gguf"
    file.write_bytes(CHAT.read_bytes())
    who = patient(tmp_path, f'{SYNTHETIC}[[models]]\nname = "chat"\nengine = "llm"\npath = "{file}"\n')
    found = by_name(doctor_engines.models(who))
    assert {name: finding.verdict for name, finding in found.items()} == {"model synthetic": "ok", "model chat": "ok"}
    out = {"models": [{"name": "chat", "state": "quarantined", "reason": "It crashed."}]}
    assert by_name(doctor_engines.models(who._replace(seen=out)))["model chat"].verdict == "fail"
    file.unlink()
    assert by_name(doctor_engines.models(who))["model chat"].verdict == "fail"
    assert by_name(doctor_engines.models(patient(tmp_path, "")))["models"].verdict == "warn"
    assert list(doctor_engines.models(Patient(None, None, tmp_path))) == []


def test_a_pulled_file_of_another_size_is_found(models_box):
    assert models_box.run("pull", str(CHAT), "--name", "mine") == 0, models_box.err
    who = Patient(models_box.toml, load(models_box.toml), models_box.models.parent)
    assert by_name(doctor_engines.models(who))["model mine"].verdict == "ok"
    pulled = Path(who.settings.models[0].path)
    pulled.unlink()  # it may be a link to the fixture
    pulled.write_bytes(b"short")
    broken = by_name(doctor_engines.models(who))["model mine"]
    assert (broken.verdict, pulled.name in broken.sentence) == ("fail", True)


# ---- GPUs


async def test_gpus_are_read_by_the_reader_that_may_hang(tmp_path, monkeypatch):
    script = tmp_path / "gpus.json"
    script.write_text(json.dumps({"gpus": [{"uuid": "GPU-1", "name": "Fake", "total": 8 * 2**30}]}))
    monkeypatch.setattr(telemetry, "reader_argv", lambda *_args: telemetry.simulated_argv(script))
    found = by_name(await doctor_engines.gpus(patient(tmp_path, SYNTHETIC)))
    assert all(finding.verdict == "ok" for finding in found.values()), found
    assert any("GPU-1" in name for name in found)


async def test_no_gpu_is_well_unless_a_model_wants_one(tmp_path):
    seen = {"gpus": [], "gpu_reason": "There is no GPU: no driver."}
    assert by_name(await doctor_engines.gpus(patient(tmp_path, SYNTHETIC, seen=seen)))["gpu"].verdict == "ok"
    wants = patient(tmp_path, SYNTHETIC + 'device = "cuda"\n', seen=seen)
    assert by_name(await doctor_engines.gpus(wants))["gpu"].verdict == "fail"


async def test_a_driver_that_hangs_is_a_failure(tmp_path, monkeypatch):
    class Silent:
        reason, driver = "It is not known.", ""

        async def run(self) -> None:
            pass

        async def wait_known(self, _deadline_s: float) -> bool:
            return False

        def readings(self) -> dict[str, object]:
            return {}

    monkeypatch.setattr(doctor_engines, "GpuWatch", Silent)
    assert by_name(await doctor_engines.gpus(patient(tmp_path, SYNTHETIC)))["gpu"].verdict == "fail"


async def test_what_a_running_supervisor_knows_of_its_gpus_counts(tmp_path):
    views = [
        {"uuid": "GPU-1", "name": "One", "free_bytes": 2**30, "total_bytes": 2**31},
        {"uuid": "GPU-2", "fault": "Xid 79."},
    ]
    found = by_name(await doctor_engines.gpus(patient(tmp_path, "", seen={"gpus": views})))
    assert (found["gpu GPU-1"].verdict, found["gpu GPU-2"].verdict) == ("ok", "fail")


# ---- confinement


async def test_the_sandbox_is_tried_in_a_real_engine(tmp_path):
    (found,) = await doctor_engines.sandbox(patient(tmp_path, SYNTHETIC))
    assert found.name == "sandbox"
    assert found.verdict in ("ok", "warn"), found


@pytest.mark.parametrize(
    ("layers", "required", "verdict"),
    [
        ({"seccomp": "verified", "user": "claimed"}, False, "ok"),
        ({"seccomp": "verified", "net": "unavailable(no right)"}, False, "warn"),
        ({"seccomp": "verified", "net": "unavailable(no right)"}, True, "fail"),
        ({}, False, "fail"),
    ],
)
def test_a_layer_that_is_missing_is_a_failure_only_where_it_is_required(tmp_path, layers, required, verdict):
    text = '[engines.synthetic]\nsandbox = "require"\n' + SYNTHETIC if required else SYNTHETIC
    told = Probe(
        engine="synthetic", backend="", device_requested="cpu", verdict="ok" if layers else "failed", sandbox=layers
    )
    (found,) = doctor_engines._layers(patient(tmp_path, text), told)
    assert found.verdict == verdict
