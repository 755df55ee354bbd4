"""What the policy grants, and above all what it does not."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from engines.catalog import CATALOG
from protocol.engine_wire import Model
from supervisor.host import grants
from supervisor.host.engine_user import User
from supervisor.host.ground import Ground
from supervisor.host.launching import ROOT, cuda_libraries
from supervisor.host.work import EngineSpec, Sandbox

SCRATCH = Path("/scratch/i1")


def spec(name: str = "embed", **sandbox: object) -> EngineSpec:
    module = CATALOG[name].module if name in CATALOG else f"{name}.engine"
    return EngineSpec(name=name, module=module, python=sys.executable, sandbox=Sandbox(**sandbox))  # type: ignore[arg-type]


def given(engine: EngineSpec, model: Model | None = None, device: str = "cpu") -> dict:
    return grants.policy(engine, SCRATCH, ROOT, model, device)


def all_paths(policy: dict) -> set[str]:
    return {path for name in ("read", "execute", "write", "devices") for path in policy[name]}


@pytest.mark.parametrize("name", [*CATALOG, "foreign"])
def test_no_engine_is_granted_the_box_or_the_home(name: str):
    forbidden = {"/", "", "/etc", "/home", "/root", "/tmp", "/run", "/var", "/dev", str(Path.home())}
    model = Model(name="m", files={"model": str(Path.home() / "model.gguf")}, device="cpu")
    assert not all_paths(given(spec(name), model)) & forbidden
    assert given(spec(name))["write"] == [str(SCRATCH)]


def test_only_the_two_that_run_programs_may_execute_those_of_the_box():
    assert {name for name in CATALOG if "/usr" in given(spec(name))["execute"]} == {"command", "server"}


def test_an_engine_of_another_repository_under_a_shipped_name_gets_no_shipped_profile():
    impostor = msgspec.structs.replace(spec("server"), module="theirs.engine")
    assert given(impostor)["network"] == "none"
    assert given(spec("server"))["network"] == "loopback"


def test_the_operator_widens_and_narrows():
    policy = given(spec("whisper", network="host", read=("/data",), write=("/out",), execute=("/tool",)))
    assert policy["network"] == "host"
    assert ("/data" in policy["read"], "/out" in policy["write"], "/tool" in policy["execute"]) == (True,) * 3
    assert "/etc/resolv.conf" in policy["read"]
    # What an engine says to itself through its own folder is no network.
    assert given(spec("llm", network="none"))["network"] == "unix"
    assert given(spec("server", network="none"))["network"] == "none"
    assert given(spec(without=("seccomp",)))["layers"] == ["uid", "namespaces", "privileges", "landlock"]


def test_a_model_is_read_with_its_company_and_where_its_links_lead(tmp_path: Path):
    cache, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "rev"
    cache.mkdir()
    snapshot.mkdir(parents=True)
    (cache / "abc").write_text("weights")
    (snapshot / "model.onnx").symlink_to("../../blobs/abc")
    adapter = tmp_path / "adapter.bin"
    adapter.write_text("x")
    for path in (snapshot, snapshot / "model.onnx"):
        model = Model(name="m", files={"model": str(path)}, device="cpu", options={"lora": [str(adapter)]})
        policy = given(spec(), model)
        assert {str(snapshot), str(cache / "abc"), str(adapter)} <= set(policy["read"])
        assert str(cache) not in policy["read"]
        assert str(snapshot) not in policy["write"]


def test_a_model_in_the_home_folder_does_not_open_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    for name in ("big-00001-of-00002.gguf", "big-00002-of-00002.gguf", "letter.txt"):
        (tmp_path / name).write_text("x")
    model = Model(name="m", files={"model": str(tmp_path / "big-00001-of-00002.gguf")}, device="cpu")
    read = set(given(spec(), model)["read"])
    assert {str(tmp_path / f"big-0000{number}-of-00002.gguf") for number in (1, 2)} <= read
    assert not {str(tmp_path), str(tmp_path / "letter.txt"), str(tmp_path / ".ssh")} & read


def test_a_program_of_the_operator_may_run_from_its_own_folder(tmp_path: Path):
    (tmp_path / "tool").write_text("#!/bin/sh\n")
    options = {"argv": [str(tmp_path / "tool"), "{in}"], "cwd": str(tmp_path / "work")}
    policy = given(spec("command"), Model(name="m", device="cpu", options=options))
    assert str(tmp_path) in policy["execute"]
    assert str(tmp_path / "work") in policy["write"]


def test_the_device_set_decides_which_gpu_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for minor, uuid in ((0, "GPU-a"), (3, "GPU-b")):
        folder = tmp_path / str(minor)
        folder.mkdir()
        (folder / "information").write_text(f"Model: X\nGPU UUID: \t {uuid}\nDevice Minor: \t {minor}\n")
    nodes = {"/dev/nvidia[0-9]*": ["/dev/nvidia0", "/dev/nvidia3"], "/dev/nvidiactl": ["/dev/nvidiactl"]}
    found = nodes | {grants._GPU_INFORMATION: [str(tmp_path / each / "information") for each in ("0", "3")]}
    monkeypatch.setattr(grants.glob, "glob", lambda pattern: found.get(pattern, []))

    def seen(device: str, *uuids: str) -> set[str]:
        policy = given(spec(), Model(name="m", device=device, devices=uuids))
        assert policy["names_threads"] is (device != "cpu")
        return {node for node in policy["devices"] if "nvidia" in node}

    assert seen("cpu") == set()
    assert seen("cuda") == {"/dev/nvidiactl", "/dev/nvidia0", "/dev/nvidia3"}
    assert seen("auto", "GPU-b") == {"/dev/nvidiactl", "/dev/nvidia3"}
    assert seen("cuda", "GPU-?") == {"/dev/nvidiactl", "/dev/nvidia0", "/dev/nvidia3"}


def test_a_folder_put_on_the_path_by_a_pth_file_is_read(tmp_path: Path):
    site = tmp_path / "venv/lib/python3.11/site-packages"
    site.mkdir(parents=True)
    (tmp_path / "src").mkdir()
    (tmp_path / "shared").mkdir()
    (site / "package").symlink_to(tmp_path / "shared")
    (site / "edit.pth").write_text(f"import os\n# no\n{tmp_path / 'src'}\n/no/such\n\n")
    (tmp_path / "venv/bin").mkdir()
    (tmp_path / "venv/pyvenv.cfg").write_text("")
    (tmp_path / "venv/bin/python").symlink_to(sys.executable)
    engine = msgspec.structs.replace(spec(), python=str(tmp_path / "venv/bin/python"))
    policy = given(engine)
    assert {str(tmp_path / "src"), str(tmp_path / "shared")} <= set(policy["read"])
    assert "/no/such" not in policy["read"]
    assert str(tmp_path / "venv") in policy["execute"]


def test_of_its_ground_it_reads_inputs_and_writes_outputs_and_of_others_nothing(tmp_path: Path):
    ground, other = Ground(tmp_path / "m0", user=None), Ground(tmp_path / "m1", user=None)
    policy = grants.policy(spec("synthetic"), ground.instance(1), ROOT, None, "cpu", ground=ground)
    assert policy["write"] == [str(ground.instance(1)), str(ground.outputs)]
    assert str(ground.inputs) in policy["read"]
    assert not all_paths(policy) & {str(ground.root), str(ground.instance(2)), str(other.root), str(tmp_path)}


def test_what_its_own_user_must_reach(tmp_path: Path):
    (tmp_path / "model.gguf").touch()
    (tmp_path / "adapter").touch()
    options = {"lora": str(tmp_path / "adapter"), "argv": ["/opt/tool", "-x"], "cwd": str(tmp_path)}
    model = Model(
        name="m",
        files={"model": str(tmp_path / "model.gguf"), "gone": str(tmp_path / "gone")},
        device="cpu",
        options=options,
    )
    engine = spec("command", read=("/data",), write=("/out",))
    assert "user" not in given(engine, model)
    user = grants.policy(engine, SCRATCH, ROOT, model, user=User(65521, 65522))["user"]
    assert (user["uid"], user["gid"]) == (65521, 65522)
    assert {sys.executable, "/opt/tool"} <= set(user["runs"])
    assert {str(tmp_path / "model.gguf"), str(tmp_path / "adapter"), "/data"} <= set(user["reads"])
    assert str(tmp_path / "gone") not in user["reads"]
    assert {str(SCRATCH), "/out", str(tmp_path)} == set(user["writes"])


def test_an_engine_of_a_gpu_finds_the_drivers_of_wsl2(monkeypatch: pytest.MonkeyPatch):
    libraries = {"/usr/lib/wsl/lib", "/usr/lib/wsl/drivers"}
    monkeypatch.setattr(grants.glob, "glob", lambda pattern: ["/dev/dxg"] if pattern == "/dev/dxg" else [])
    policy = given(spec(), Model(name="m", device="cuda"))
    assert "/dev/dxg" in policy["devices"]
    assert libraries <= set(policy["execute"])
    assert policy["names_threads"]
    without = given(spec(), Model(name="m", device="cpu"))
    assert "/dev/dxg" not in without["devices"]
    assert not libraries & set(without["execute"])
    monkeypatch.setattr(grants.glob, "glob", lambda pattern: ["/dev/nvidiactl"] if pattern == "/dev/nvidiactl" else [])
    assert not libraries & set(given(spec(), Model(name="m", device="cuda"))["execute"])


@pytest.fixture
def prefix() -> Iterator[Path]:
    """An installation that its own user can reach, with all that is looked for in one; seen by a plain user."""
    with tempfile.TemporaryDirectory(prefix="bulkhead-test-") as name:
        Path(name).chmod(0o755)
        made = Path(name) / "prefix"
        site = made / "lib/python3.11/site-packages"
        for folder in (site, made / "src/inner", made / "bin", made / "models/deep"):
            folder.mkdir(parents=True)
        (site / "package").symlink_to(made / "src/inner")
        (site / "edit.pth").write_text(f"{made / 'src/inner'}\n")
        (made / "bin/python").symlink_to(sys.executable)
        (made / "models/model.gguf").touch()
        yield made
        for folder in (made, *made.rglob("*")):
            if folder.is_dir() and not folder.is_symlink():
                folder.chmod(0o755)


@contextlib.contextmanager
def plain_user() -> Iterator[None]:
    """Root reads everything; so for a moment be somebody else."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(12345)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("mode", [0o311, 0o000])
@pytest.mark.parametrize("shut", ["", "lib", "lib/python3.11", "lib/python3.11/site-packages", "src", "bin", "models"])
def test_what_cannot_be_read_is_left_out(prefix: Path, shut: str, mode: int):
    """Python runs from an installation whose folders cannot be listed, as one below /root may be."""
    engine = msgspec.structs.replace(spec("command"), python=str(prefix / "bin/python"))
    files = {"model": str(prefix / "models/model.gguf"), "folder": str(prefix / "models")}
    model = Model(name="m", files=files, device="cpu", options={"argv": [str(prefix / "bin/tool")]})
    (prefix / shut).chmod(mode)
    with plain_user():
        policy = grants.policy(engine, SCRATCH, ROOT, model, "cpu", user=User(65521, 65521))
        assert cuda_libraries(engine.python) == ""
    assert str(SCRATCH) in policy["write"]
    if shut in ("bin", "models", "lib/python3.11/site-packages"):
        assert (str(prefix / "src/inner") in policy["read"]) == (shut != "lib/python3.11/site-packages")
