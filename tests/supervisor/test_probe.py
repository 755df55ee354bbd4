"""engine-probe on real children: a foreign engine that misbehaves on demand, and the shipped synthetic one."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import trio

from supervisor import conformance
from supervisor import probe as probing
from supervisor.errors import ExitCode
from supervisor.host.work import EngineSpec
from supervisor.machine.gpu import Gpu, Machine
from supervisor.probe import Target, all_well, engine_specs, main, probe_all, probe_engine, render, targets
from supervisor.probe_verdict import Probe
from supervisor.settings import EngineTable


def made(verdict: str = "ok", **fields: object) -> Probe:
    return Probe(engine="llm", backend="", device_requested="cpu", verdict=verdict, **fields)  # type: ignore[arg-type]


async def test_a_good_engine_of_another_repository_is_ok(wordy):
    probe = await probe_engine("wordy", wordy(), "", "cpu", deadline_s=30)
    assert probe.ok, probe
    assert probe.device_executed == "cpu"
    assert probe.kinds == ("x-shout",)
    assert probe.versions == {"wordy": "1.0"}
    assert probe.load_ms is not None
    assert probe.infer_ms is not None
    assert probe.rss_bytes
    assert probe.hint == ""


async def test_our_own_engine_in_an_interpreter_of_its_own_can_start_programs(foreign_python: str):
    """Its sandbox lets it pass through the folder that our packages lie in, and not list it."""
    engine = EngineSpec(name="command", module="engines.command.engine", python=foreign_python)
    probe = await probe_engine("command", engine, "", "cpu", deadline_s=30)
    assert probe.ok, probe


@pytest.mark.parametrize(
    ("wrong", "verdict", "said"),
    [
        ("crash-import", "crashed(SIGSEGV)", "while importing"),
        ("crash-load", "crashed(SIGABRT)", "while loading"),
        ("exit", "failed", "ended with exit code 3"),
        ("no-library", "not-installed", "a_library_that_is_not_installed"),
        ("no-shared-object", "failed", "libcublas.so.12"),
        ("answer", "failed", "got {'text': 'WRONG'}"),
    ],
)
async def test_every_ending_has_its_verdict(wordy, wrong: str, verdict: str, said: str):
    probe = await probe_engine("wordy", wordy(wrong), "", "cpu", deadline_s=30)
    assert probe.verdict == verdict
    assert said in probe.message
    assert probe.hint


async def test_a_hang_ends_at_the_deadline_and_leaves_no_process(wordy, tmp_path, mock_clock):
    """The clock runs as usual, and jumps to the deadline once the engine hangs, however long its start has taken."""
    mock_clock.rate = 1.0
    (kept := tmp_path / "probes").mkdir()

    async def jump() -> None:
        while not list(kept.glob("bh-probe-*/hangs")):  # noqa: ASYNC110  nothing tells us of a file
            await trio.sleep(0.01)
        mock_clock.jump(600)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(jump)
        probe = await probe_engine("wordy", wordy("hang-load"), "", "cpu", deadline_s=600, folder=kept)
    assert probe.verdict == "hung"
    assert "600 s while loading" in probe.message
    assert not [pid for pid in _children() if "wordy_engine" in pid]


def _children() -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            parent = (entry.parent / "stat").read_text().rsplit(")", 1)[1].split()[1]
            if int(parent) == os.getpid():
                found.append(entry.read_text().replace("\0", " "))
        except OSError:
            continue
    return found


async def test_a_silent_fall_to_the_cpu_is_told_as_such(wordy):
    probe = await probe_engine("wordy", wordy(), "", "cuda", deadline_s=30)
    assert probe.verdict == "cpu-fallback"
    assert probe.device_executed == "cpu"
    assert not probe.ok


async def test_the_hint_knows_that_there_is_no_gpu(wordy):
    machine = Machine(error="NVML Shared Library Not Found")
    probe = await probe_engine("wordy", wordy(), "", "cuda", deadline_s=30, machine=machine)
    assert "No NVIDIA GPU was found here" in probe.hint


async def test_a_missing_interpreter_is_named(tmp_path):
    engine = EngineSpec(name="llm", module="engines.llm.engine", python=str(tmp_path / "python"))
    probe = await probe_engine("llm", engine, "", "cpu")
    assert probe.verdict == "failed"
    assert str(tmp_path / "python") in probe.message
    assert "[engines.llm]" in probe.hint


async def test_the_scratch_folder_is_removed(wordy, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    await probe_engine("wordy", wordy(), "", "cpu", deadline_s=30)
    assert list(tmp_path.iterdir()) == []


async def test_the_scratch_folder_lies_where_it_is_wanted(wordy, tmp_path):
    """A supervisor that is killed while it probes finds what it left at its next start, below its state folder."""
    kept = tmp_path / "probes"
    kept.mkdir()
    seen: list[list[str]] = []
    async with trio.open_nursery() as nursery:

        async def look() -> None:
            while not (names := os.listdir(kept)):  # noqa: ASYNC110  nothing tells us of a folder
                await trio.sleep(0.001)
            seen.append(names)

        nursery.start_soon(look)
        with trio.fail_after(30):
            assert (await probe_engine("wordy", wordy(), "", "cpu", deadline_s=30, folder=kept)).ok
    assert seen[0][0].startswith("bh-probe-")
    assert os.listdir(kept) == []


async def test_results_keep_the_order_of_the_targets(wordy):
    asked = [Target(name="a", engine=wordy("crash-import")), Target(name="b", engine=wordy())]
    probes = await probe_all(asked, deadline_s=30, machine=None)
    assert [probe.engine for probe in probes] == ["a", "b"]
    assert [probe.ok for probe in probes] == [False, True]


# ---- what is probed and what decides the exit code -----------------------------------------------------------

ENGINES = engine_specs({})


def test_every_backend_and_known_device_of_the_catalogue_is_probed():
    found = targets([], ENGINES, ("cpu", "cuda"))
    assert {(t.name, t.backend, t.device) for t in found} >= {
        ("llm", "xllamacpp", "cpu"),
        ("llm", "llama-cpp-python", "cuda"),
        ("synthetic", "", "cpu"),
    }
    assert ("synthetic", "cuda") not in {(t.name, t.device) for t in found}


def test_a_device_that_was_asked_for_is_tried_even_if_the_engine_does_not_know_it():
    (target,) = targets(["synthetic"], ENGINES, ("cuda",), device_asked=True)
    assert target.device == "cuda"


def judged(asked: list[str], verdicts: list[str], *, devices=("cpu",), device_asked=False, backend="") -> bool:
    found = targets(asked, ENGINES, devices, device_asked=device_asked, backend=backend)
    probes = [made(verdict) for verdict in verdicts]
    assert len(probes) == len(found)
    return all_well(found, probes)


def test_the_exit_code_follows_what_was_asked_for():
    assert judged(["whisper"], ["ok"])
    assert not judged(["whisper"], ["not-installed"])
    assert not judged(["whisper"], ["hung"])
    assert judged(["llm"], ["ok", "not-installed"]), "one backend is enough"
    assert judged(["llm"], ["not-installed", "ok"]), "either one"
    assert not judged(["llm"], ["not-installed", "not-installed"])
    assert not judged(["llm"], ["ok", "failed"]), "an installed backend that fails is a failure"
    assert not judged(["llm"], ["not-installed"], backend="xllamacpp")


def test_nothing_asked_means_that_the_installed_ones_must_work():
    found = targets([], ENGINES, ("cpu",))
    assert all_well(found, [made("not-installed")] * len(found))
    assert not all_well(found, [made("not-installed")] * (len(found) - 1) + [made("crashed(SIGSEGV)")])


def test_a_gpu_that_was_only_found_does_not_decide_but_one_asked_for_does():
    assert judged(["whisper"], ["ok", "cpu-fallback"], devices=("cpu", "cuda"))
    assert not judged(["whisper"], ["ok", "cpu-fallback"], devices=("cpu", "cuda"), device_asked=True)


# ---- output and command line -----------------------------------------------------------------------------------


def test_the_table_shows_hints_and_copyleft_licences_below():
    text = render(
        [
            made("not-installed", message="No module named 'xllamacpp'.", hint="`pip install it`"),
            Probe(
                engine="piper",
                backend="",
                device_requested="cpu",
                verdict="ok",
                device_executed="cpu",
                compute_type="float32",
                load_ms=12.34,
                infer_ms=123.4,
                rss_bytes=57 * 2**20,
                licence="GPL-3.0-or-later",
            ),
        ]
    )
    head, *_ = text.splitlines()
    assert head.split()[:2] == ["engine", "backend"]
    assert "12.3" in text
    assert "57" in text
    assert "`pip install it`" in text
    assert "piper: GPL-3.0-or-later" in text


def test_json_has_the_promised_fields(capsys):
    code = main(["synthetic", "--device", "cpu", "--json"])
    (found,) = json.loads(capsys.readouterr().out)
    assert code == 0
    assert found["verdict"] == "ok"
    assert {"engine", "backend", "device_requested", "device_executed", "verdict", "hint"} <= set(found)
    assert {"versions", "load_ms", "infer_ms", "rss_bytes", "licence"} <= set(found)
    assert found["device_executed"] == "cpu"


def test_asking_for_a_gpu_where_none_works_fails(capsys, monkeypatch):
    async def no_gpu() -> Machine:
        return Machine(error="none here")

    monkeypatch.setattr(probing, "read_machine", no_gpu)
    assert main(["synthetic", "--device", "cuda"]) == ExitCode.FAILED
    assert "none here" in capsys.readouterr().out


def test_waiting_for_a_gpu_in_vain_fails(capsys, monkeypatch):
    async def none(patience_s: float) -> Machine:
        assert patience_s == 0.1
        return Machine(error="still none")

    monkeypatch.setattr(probing, "wait_for_gpu", none)
    assert main(["synthetic", "--wait-for-gpu", "0.1", "--device", "cpu"]) == ExitCode.FAILED
    assert "still none" in capsys.readouterr().err


def test_a_gpu_that_is_there_is_probed_without_being_asked(capsys, monkeypatch, wordy):
    async def one() -> Machine:
        return Machine(gpus=(Gpu(index=0),))

    monkeypatch.setattr(probing, "read_machine", one)
    spec = wordy()
    code = main(["--module", spec.module, "--python", spec.python, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [probe["device_requested"] for probe in found] == ["cpu", "cuda"]
    assert [probe["verdict"] for probe in found] == ["ok", "cpu-fallback"]
    assert code == 0


def test_engines_of_the_configuration_are_probed_with_their_interpreters(tmp_path, capsys, wordy):
    spec = wordy()
    config = tmp_path / "worker.toml"
    config.write_text(f'[engines.mine]\nmodule = "{spec.module}"\npython = "{spec.python}"\n')
    assert main(["mine", "--device", "cpu", "--config", str(config), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["python"] == spec.python


def test_a_broken_configuration_is_told(tmp_path, capsys):
    config = tmp_path / "worker.toml"
    config.write_text("[engines.mine]\n")
    assert main(["--config", str(config)]) == ExitCode.BAD_CONFIG
    assert "mine" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["nonesuch"], ["--device", "tpu"], ["--conformance", "nonesuch"]])
def test_a_wrong_command_line_is_64(argv: list[str], capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == ExitCode.USAGE
    assert capsys.readouterr().err


def test_conformance_from_the_command_line(capsys, wordy, monkeypatch):
    for name in ("PONG_S", "CANCEL_S", "EXIT_S"):  # too little where other tests have the processor
        monkeypatch.setattr(conformance, name, 40.0)
    spec = wordy()
    argv = ["--conformance", "wordy", "--module", spec.module, "--python", spec.python]
    assert main(argv) == 0
    assert "0 failed" in capsys.readouterr().out
    assert main([*argv, "--json"]) == 0
    assert {case["status"] for case in json.loads(capsys.readouterr().out)} == {"ok"}


def test_an_engine_that_nobody_knows_needs_a_module():
    with pytest.raises(ValueError, match="neither in the catalogue"):
        probing.engine_spec("mine", EngineTable())
    assert probing.engine_spec("llm", EngineTable()).python == sys.executable
