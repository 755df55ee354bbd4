"""`supervisor setup`: the order of things with real venvs that take no time, and once for real."""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from supervisor import setup
from supervisor.errors import ExitCode
from supervisor.machine.gpu import Gpu, Machine
from supervisor.probe_verdict import Probe
from supervisor.setup import SetupFailed, make_venv
from supervisor.setup_plan import VenvPlan, plan

NO_GPU = Machine(error="none here")
CUDA = Machine(
    os="linux", arch="x86_64", driver="570", cuda_max="12.8", gpus=(Gpu(index=0, name="L4", compute_capability="8.9"),)
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch, capsys):
    """`run(*argv)` -> (exit code, stdout, stderr), with a home of its own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name in ("BULKHEAD_CONFIG", "STATE_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)

    def start(*argv: str) -> tuple[int, str, str]:
        parser = argparse.ArgumentParser()
        setup.add_arguments(parser)
        capsys.readouterr()
        code = setup.main(parser.parse_args([str(word) for word in argv]))
        return (code, *capsys.readouterr())

    return start


@pytest.fixture
def machine(monkeypatch):
    """Set what the GPU reader tells."""

    def put(value: Machine) -> None:
        async def read() -> Machine:
            return value

        monkeypatch.setattr(setup, "read_machine", read)

    put(NO_GPU)
    return put


@pytest.fixture
def made(monkeypatch):
    """Replace installing and probing; returns what they were asked and the verdicts to give."""
    asked: dict[str, Any] = {"made": [], "probed": [], "verdicts": {}}

    async def make(what: VenvPlan, venvs: Path) -> Path:
        asked["made"].append((what.engine, what.requirements, venvs))
        if what.engine == "video":
            raise SetupFailed("pip ended with exit code 1")
        return Path(sys.executable)

    async def probe(name: str, engine: Any, backend: str, device: str, **_options: Any) -> Probe:
        asked["probed"].append((name, engine.python, device, dict(engine.env)))
        verdict = asked["verdicts"].get(name, "ok")
        return Probe(engine=name, backend=backend, device_requested=device, verdict=verdict, message="", hint="")

    monkeypatch.setattr(setup, "make_venv", make)
    monkeypatch.setattr(setup, "probe_engine", probe)
    return asked


def test_a_dry_run_prints_the_plan_and_touches_nothing(run, machine, tmp_path: Path):
    code, out, _err = run("--dry-run")
    assert code == 0
    assert "no NVIDIA GPU" in out
    assert "xllamacpp==" in out
    assert "none here" in out
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_for_a_gpu_box_as_json(run, machine):
    machine(CUDA)
    code, out, _err = run("--dry-run", "--json", "--engines", "image,whisper")
    assert code == 0
    image, whisper = json.loads(out)
    assert (image["engine"], image["device"], image["requirements"]) == ("image", "cuda", "image-cu12")
    assert "onnxruntime-gpu==1.26.0" in image["packages"]
    assert whisper["device"] == "cuda"


def test_only_what_was_proven_is_written(run, machine, made, tmp_path: Path):
    Path("worker.toml").write_text('# mine\n[engines.image]\ndevice = "auto"  # hm\n')
    made["verdicts"]["image"] = "crashed(SIGSEGV)"
    code, out, _err = run("--engines", "whisper", "image", "video")
    assert code == ExitCode.FAILED
    config = tomllib.loads(Path("worker.toml").read_text())
    assert config["engines"] == {"image": {"device": "auto"}, "whisper": {"python": sys.executable, "device": "cpu"}}
    assert "# mine" in Path("worker.toml").read_text()
    assert "now uses: whisper" in out
    assert "pip ended with exit code 1" in out
    assert [engine for engine, _, _ in made["made"]] == ["whisper", "image", "video"]
    assert made["made"][0][2] == tmp_path / "state" / "bulkhead" / "venvs"


def test_a_gpu_environment_is_proved_on_the_gpu(run, machine, made):
    machine(CUDA)
    code, out, _err = run("--engines", "whisper", "--json")
    assert code == 0
    assert made["probed"] == [("whisper", sys.executable, "cuda", {})]
    config = tomllib.loads((Path.home() / ".config/bulkhead/worker.toml").read_text())
    assert config["engines"]["whisper"] == {"python": sys.executable, "device": "cuda"}
    assert json.loads(out)[0]["written"] is True


def test_a_gpu_that_does_not_work_suggests_the_cpu(run, machine, made):
    machine(CUDA)
    made["verdicts"]["image"] = "cpu-fallback"
    code, out, _err = run("--engines", "image")
    assert code == ExitCode.FAILED
    assert "--device cpu --engines image" in out


@pytest.mark.parametrize(("name", "said"), [("command", "needs no environment"), ("lmm", "is not known")])
def test_engines_without_an_environment_are_refused(run, machine, name: str, said: str):
    code, _out, err = run("--engines", name)
    assert code == ExitCode.FAILED
    assert said in err


def test_an_old_python_makes_nothing(run, machine, made):
    machine(Machine(python="3.9.1"))
    code, out, _err = run("--engines", "llm")
    assert code == ExitCode.FAILED
    assert "3.11 or newer" in out
    assert made["made"] == []


# ---- one environment -------------------------------------------------------------------------------------------


@pytest.fixture
def fake_tools(monkeypatch):
    """`venv` and pip as two small programs that really run."""
    ran: list[tuple[str, ...]] = []
    real = setup._run

    async def run_tool(name: str, argv: tuple[str, ...]) -> None:
        ran.append(argv)
        if argv[1:3] == ("-m", "venv"):
            (Path(argv[-1]) / "bin").mkdir(parents=True)
            (Path(argv[-1]) / "bin" / "python").symlink_to(sys.executable)
            return
        await real(name, (argv[0], "-c", ran_program))

    ran_program = "print('Collecting things')"
    monkeypatch.setattr(setup, "_run", run_tool)
    return ran


async def test_an_environment_is_made_once(tmp_path: Path, fake_tools):
    (what,) = plan(NO_GPU, ["llm"])
    python = await make_venv(what, tmp_path)
    assert python.parent.parent.name.startswith("llm-cpu-")
    (_venv, pip) = fake_tools
    assert {"--require-hashes", "--no-deps", "--only-binary"} <= set(pip)
    assert pip[-1].endswith("llm-cpu.txt")
    assert await make_venv(what, tmp_path) == python
    assert len(fake_tools) == 2


async def test_an_unfinished_environment_is_made_anew(tmp_path: Path, fake_tools):
    (what,) = plan(NO_GPU, ["llm"])
    python = await make_venv(what, tmp_path)
    (python.parents[1] / setup._COMPLETE).unlink()
    await make_venv(what, tmp_path)
    assert len(fake_tools) == 4


async def test_a_failing_tool_is_told_with_its_last_words(tmp_path: Path):
    with pytest.raises(SetupFailed, match=r"exit code 3: .*no such hash"):
        await setup._run("llm", (sys.executable, "-c", "import sys; print('no such hash'); sys.exit(3)"))


async def test_too_little_space_is_told_first(tmp_path: Path, fake_tools, monkeypatch):
    (what,) = plan(CUDA, ["image"])
    monkeypatch.setattr("shutil.disk_usage", lambda _path: _Usage())
    with pytest.raises(SetupFailed, match="--venvs"):
        await make_venv(what, tmp_path)
    assert fake_tools == []


class _Usage:
    free = 100 * 2**20


@pytest.mark.slow
@pytest.mark.engine
def test_a_small_engine_for_real(run, tmp_path: Path):
    code, out, err = run("--engines", "llm", "--device", "cpu", "--venvs", str(tmp_path / "venvs"))
    if "Could not find a version" in out + err or "Connection" in out + err:
        pytest.skip(f"no package index here: {out[-300:]}")
    assert code == 0, out + err
    table = tomllib.loads((tmp_path / ".config/bulkhead/worker.toml").read_text())["engines"]["llm"]
    assert table["device"] == "cpu"
    assert Path(table["python"]).is_relative_to(tmp_path / "venvs")
    assert Path(table["python"]).exists()
