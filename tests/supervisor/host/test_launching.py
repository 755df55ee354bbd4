"""What an engine child is given: argv, environment, and the CUDA libraries of its own interpreter."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import msgspec
import pytest

from protocol.engine_wire import Model
from supervisor.host import launching
from supervisor.host.child import run_child
from supervisor.host.engine_user import User
from supervisor.host.ground import Ground
from supervisor.host.launching import ROOT, cuda_libraries, engine_child
from supervisor.host.work import EngineSpec, Sandbox

ENGINE = EngineSpec(name="e", module="engines.synthetic.engine", python=sys.executable)


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """An environment with two CUDA wheels; its interpreter is a link, as in every venv. Returns the interpreter."""
    for wheel in ("cudnn", "cublas"):
        (tmp_path / "venv/lib/python3.11/site-packages/nvidia" / wheel / "lib").mkdir(parents=True)
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    return python


def told(engine: EngineSpec) -> dict:
    return json.loads(engine_child(engine, Path("/scratch"), ["probe"]).argv[-1])


def folders(venv: Path) -> str:
    nvidia = venv.parents[1] / "lib/python3.11/site-packages/nvidia"
    return f"{nvidia}/cublas/lib:{nvidia}/cudnn/lib"


def test_the_launcher_is_told_what_to_become():
    spec = told(ENGINE)
    assert (spec["root"], spec["module"], spec["python"]) == (str(ROOT), ENGINE.module, sys.executable)
    assert (spec["scratch"], spec["parent"], spec["args"]) == ("/scratch", os.getpid(), ["probe"])


def test_values_of_the_environment_never_stand_in_argv():
    child = engine_child(msgspec.structs.replace(ENGINE, env={"TOKEN": "s3cret"}), Path("/scratch"))
    assert "s3cret" not in " ".join(child.argv)
    assert child.env is not None
    assert child.env["TOKEN"] == "s3cret"
    assert json.loads(child.argv[-1])["keep"] == ["TOKEN"]


def test_nothing_else_of_our_environment_is_passed_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/ours")
    child = engine_child(ENGINE, Path("/scratch"))
    assert child.env is not None
    assert not {"AWS_SECRET_ACCESS_KEY", "LD_LIBRARY_PATH"} & set(child.env)


def test_cuda_libraries_lie_beside_the_interpreter(venv: Path, tmp_path: Path):
    assert cuda_libraries(str(venv)) == folders(venv)
    assert cuda_libraries(str(tmp_path / "other" / "bin" / "python")) == ""


def test_only_the_engine_gets_them_and_the_operators_own_path_wins(venv: Path):
    engine = msgspec.structs.replace(ENGINE, python=str(venv))
    assert told(engine)["env"] == {"LD_LIBRARY_PATH": folders(venv)}
    assert "LD_LIBRARY_PATH" not in (engine_child(engine, Path("/scratch")).env or {})
    chosen = msgspec.structs.replace(engine, env={"LD_LIBRARY_PATH": "/mine"})
    assert "env" not in told(chosen)
    assert told(chosen)["keep"] == ["LD_LIBRARY_PATH"]
    assert "env" not in told(msgspec.structs.replace(engine, python="/nowhere/bin/python"))


async def test_the_engine_starts_with_them(venv: Path, tmp_path: Path):
    """The real launcher, and an interpreter that says what it was given instead of serving."""
    venv.unlink()
    venv.write_text('#!/bin/sh\necho "$LD_LIBRARY_PATH"\n')
    venv.chmod(0o755)
    # The stand-in is a script of /bin/sh, which no profile of an engine lets it execute.
    engine = msgspec.structs.replace(ENGINE, python=str(venv), sandbox=Sandbox(mode="off"))
    output, how, child = await run_child(engine_child(engine, tmp_path), deadline_s=30)
    assert how.code == 0, child.stderr_tail()
    assert output.decode().strip() == folders(venv)


def test_its_ground_is_made_and_bounds_its_files(tmp_path: Path):
    ground = Ground(tmp_path / "m0", limit_bytes=1000, user=None)
    child = engine_child(ENGINE, tmp_path / "m0/i1", ground=ground, cgroup="/sys/fs/cgroup/x")
    spec = json.loads(child.argv[-1])
    assert ground.inputs.is_dir()
    assert ground.outputs.is_dir()
    assert spec["rlimits"] == {"FSIZE": 1000}
    assert spec["cgroup"] == "/sys/fs/cgroup/x"
    assert str(ground.outputs) in spec["sandbox"]["write"]
    plain = told(ENGINE)
    assert "cgroup" not in plain
    assert "rlimits" not in plain


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives folders away")
@pytest.mark.parametrize(("mode", "owner"), [("best-effort", 65530), ("off", 0)])
def test_root_gives_the_scratch_folder_to_the_engines_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, owner: int
):
    monkeypatch.setattr(launching, "engine_user", lambda: User(65530, 65531))
    engine = msgspec.structs.replace(ENGINE, sandbox=Sandbox(mode=mode))
    spec = json.loads(engine_child(engine, tmp_path).argv[-1])
    assert tmp_path.stat().st_uid == owner
    assert spec["sandbox"].get("user", {}).get("uid", 0) == owner


def test_on_macos_the_launcher_gets_a_profile_of_the_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert "seatbelt" not in told(ENGINE)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(launching, "engine_user", lambda: None)
    (tmp_path / "model").touch()

    def text(device: str, **model: object) -> str:
        argv = engine_child(ENGINE, tmp_path, ["probe", "--device", device], **model).argv  # type: ignore[arg-type]
        return json.loads(argv[-1])["seatbelt"]

    cpu, gpu = text("cpu"), text("auto")
    assert f'(subpath "{ROOT}/engines")' in cpu
    assert f'(subpath "{os.path.realpath(sys.prefix)}")' in cpu
    assert f'(allow file-read* file-write*\n  (subpath "{os.path.realpath(tmp_path)}"))' in cpu
    assert ("AGXDeviceUserClient" in cpu, "AGXDeviceUserClient" in gpu) == (False, True)
    # With a model it is the model's own device that counts.
    assert "AGXDeviceUserClient" not in text("auto", model=Model(name="m", device="cpu"))


def test_a_path_that_no_profile_can_name_leaves_the_profile_out_and_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    odd = tmp_path / "a\nb"
    odd.mkdir()
    assert launching.seatbelt({"read": [str(odd)]}, "cpu") == ""
    assert "control characters" in caplog.text


def test_the_libraries_of_wsl2_are_found(venv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launching, "_WSL_LIBRARIES", tmp_path / "wsl")
    assert cuda_libraries(str(venv)) == folders(venv)
    (tmp_path / "wsl").mkdir()
    assert cuda_libraries(str(venv)) == f"{folders(venv)}:{tmp_path / 'wsl'}"
    assert cuda_libraries("/nowhere/bin/python") == str(tmp_path / "wsl")
