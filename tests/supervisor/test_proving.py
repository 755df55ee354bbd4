from __future__ import annotations

import errno
import sys

import pytest
import trio

from protocol.engine_wire import Model
from protocol.faults import refuse
from supervisor.host.work import EngineSpec, ModelSpec
from supervisor.link.reconnect import Backoff
from supervisor.probe_verdict import Probe
from supervisor.proving import Prover, Verdicts, circumstances_of


def spec(name: str, engine: str = "llm", device: str = "cpu", python: str = sys.executable) -> ModelSpec:
    made = EngineSpec(name=engine, module=f"engines.{engine}.engine", python=python)
    return ModelSpec(name=name, engine=made, model=Model(name=name, device=device))


class Lab:
    """Verifies and probes as the test says, and counts."""

    def __init__(self, tmp_path) -> None:
        self.probed: list[tuple[str, str]] = []
        self.verdicts: dict[str, list[str]] = {}
        self.damaged: set[str] = set()
        self.proofs: list[tuple[str, bool, str]] = []
        self.path = tmp_path / "verdicts.json"

    async def verify(self, spec: ModelSpec) -> str:
        await trio.lowlevel.checkpoint()
        if spec.name in self.damaged:
            raise refuse("model_corrupt", "it is damaged")
        return f"rev-{spec.name}"

    async def probe(self, name, engine, backend, device, *, deadline_s) -> Probe:
        self.probed.append((name, device))
        await trio.sleep(1)
        waiting = self.verdicts.get(name, [])
        verdict = waiting.pop(0) if waiting else "ok"
        return Probe(engine=name, backend=backend, device_requested=device, verdict=verdict, message="M.", hint="H.")

    async def prove(self, *specs: ModelSpec) -> None:
        prover = Prover(
            self.verify,
            Verdicts(self.path),
            lambda spec, proof: self.proofs.append((spec.name, proof.ok, proof.revision or proof.reason)),
            probe=self.probe,
            backoff=lambda: Backoff(30, 900, chance=lambda: 1.0),
        )
        with trio.move_on_after(300):
            await prover.prove_all(specs)


# Threads cannot be told from sleep under an autojump clock, so the only thread is taken out.
@pytest.fixture
def lab(tmp_path, monkeypatch):
    async def at_once(function, *args: object):
        await trio.lowlevel.checkpoint()
        return function(*args)

    monkeypatch.setattr(trio.to_thread, "run_sync", at_once)
    return Lab(tmp_path)


async def test_one_probe_serves_all_models_of_an_engine(autojump_clock, lab):
    await lab.prove(spec("a"), spec("b"), spec("c", device="cuda"))
    assert sorted(lab.probed) == [("llm", "cpu"), ("llm", "cuda")]
    assert sorted(lab.proofs) == [("a", True, "rev-a"), ("b", True, "rev-b"), ("c", True, "rev-c")]


async def test_a_passed_probe_is_remembered_until_something_changes(autojump_clock, lab, monkeypatch):
    await lab.prove(spec("a"))
    await lab.prove(spec("a"))
    assert len(lab.probed) == 1
    monkeypatch.setattr("supervisor.proving.circumstances_of", lambda _engine: "a new driver")
    await lab.prove(spec("a"))
    assert len(lab.probed) == 2
    lab.path.write_bytes(b"{")
    await lab.prove(spec("a"))
    assert len(lab.probed) == 3


async def test_what_failed_is_not_announced_and_is_tried_again(autojump_clock, lab, caplog):
    lab.verdicts["llm"] = ["cpu-fallback", "crashed(SIGSEGV)"]
    await lab.prove(spec("a"))
    assert [ok for _, ok, _ in lab.proofs] == [False, False, True]
    assert "the probe of the engine llm says cpu-fallback: M. H." in caplog.text
    assert trio.current_time() == pytest.approx(30 + 60 + 3, abs=0.01)


async def test_a_damaged_file_is_found_before_any_probe(autojump_clock, lab):
    lab.damaged = {"a"}
    await lab.prove(spec("a"), spec("b", engine="piper"))
    assert ("a", False, "it is damaged") in lab.proofs
    assert ("b", True, "rev-b") in lab.proofs
    assert lab.probed == [("piper", "cpu")]


def test_circumstances_change_with_the_interpreter_and_its_packages(tmp_path):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.touch()
    packages = tmp_path / "lib" / "python3.11" / "site-packages"
    packages.mkdir(parents=True)
    engine = spec("a", python=str(python)).engine
    before = circumstances_of(engine)
    assert circumstances_of(engine) == before
    (packages / "new_package").mkdir()
    assert circumstances_of(engine) != before
    assert circumstances_of(spec("a", engine="piper").engine) != before


async def test_a_full_disk_is_waited_out(autojump_clock, lab, monkeypatch, caplog):
    well = lab.probe
    full = [True, True]

    async def probe(*what: object, **more: object) -> Probe:
        await trio.lowlevel.checkpoint()
        if full and full.pop():
            raise OSError(errno.ENOSPC, "No space left on device")
        return await well(*what, **more)

    monkeypatch.setattr(lab, "probe", probe)
    await lab.prove(spec("a"))
    assert [ok for _name, ok, _said in lab.proofs] == [False, False, True]
    assert "No space left" in caplog.text
