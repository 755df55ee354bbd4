"""Which user engines get: one that nobody else has."""

from __future__ import annotations

import grp
import json
import os
import pwd
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from supervisor.host import engine_user as module
from supervisor.host.engine_user import NAMELESS, User, engine_user, found, mapped, why_not

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _fresh():
    engine_user.cache_clear()
    yield
    engine_user.cache_clear()


def test_a_user_made_for_it_is_taken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pwd, "getpwnam", lambda name: SimpleNamespace(pw_uid=970, pw_gid=971) if name else None)
    assert found() == User(970, 971)
    monkeypatch.setattr(pwd, "getpwnam", lambda _name: SimpleNamespace(pw_uid=0, pw_gid=0))
    assert found() is None


def test_else_a_number_that_nobody_has(monkeypatch: pytest.MonkeyPatch):
    def nobody(_name: str) -> None:
        raise KeyError

    monkeypatch.setattr(pwd, "getpwnam", nobody)
    monkeypatch.setattr(pwd, "getpwall", lambda: [SimpleNamespace(pw_uid=65521)])
    monkeypatch.setattr(grp, "getgrall", lambda: [SimpleNamespace(gr_gid=65522)])
    assert found() == User(65523, 65523)
    monkeypatch.setattr(pwd, "getpwall", lambda: [SimpleNamespace(pw_uid=number) for number in NAMELESS])
    assert found() is None
    assert 65534 not in NAMELESS


def test_only_root_has_a_user_to_drop_to(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert (engine_user(), why_not()) == (None, "")
    engine_user.cache_clear()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(module.sys, "platform", "linux")
    assert engine_user() == found()


def test_a_map_says_which_numbers_there_are(tmp_path: Path):
    (tmp_path / "map").write_text("         0     100000      65536\n     70000          0          2\n")
    there = mapped(tmp_path / "map")
    assert [there(number) for number in (0, 65521, 65535, 65536, 70001, 70002)] == [
        *(True, True, True),
        *(False, True, False),
    ]
    assert mapped(tmp_path / "none")(65521)  # no such file: no user namespaces


@pytest.mark.parametrize(("uids", "gids"), [("0 0 1", "0 0 65536"), ("0 0 65536", "0 0 1")])
def test_a_number_that_is_not_mapped_is_no_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uids: str, gids: str):
    (tmp_path / "uid_map").write_text(uids)
    (tmp_path / "gid_map").write_text(gids)
    monkeypatch.setattr(module, "MAPS", (tmp_path / "uid_map", tmp_path / "gid_map"))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert (engine_user(), why_not()) == (None, "unmapped")


_ENGINE = """
import json, sys
from pathlib import Path
import trio
from supervisor.host.child import run_child
from supervisor.host.ground import Ground
from supervisor.host.launching import engine_child
from supervisor.host.work import EngineSpec
ground = Ground(Path(sys.argv[1]) / "m0")
scratch = ground.make_instance(1)
ground.open_attempt("j.1").remove()
engine = EngineSpec(name="synthetic", module="engines.synthetic.engine", python=sys.executable)
child = engine_child(engine, scratch, ["probe", "--device", "cpu"], ground=ground)
output, how, child = trio.run(lambda: run_child(child, deadline_s=50))
rungs = [json.loads(line) for line in output.splitlines()]
print(json.dumps([how.code, rungs[-1]["rung"], rungs[0]["sandbox"], child.stderr_tail()]))
"""


def test_root_of_a_namespace_that_maps_only_itself_starts_engines(tmp_path: Path):
    """As `unshare -Ur` and rootless containers have it: who is root there can give files to nobody."""
    namespace = ["unshare", "--user", "--map-root-user"]
    if subprocess.run([*namespace, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no user namespaces here")
    done = subprocess.run(
        [*namespace, sys.executable, "-c", _ENGINE, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    code, rung, verdicts, stderr = json.loads(done.stdout)
    assert (code, rung) == (0, "answer"), stderr
    assert verdicts["uid"] == "unavailable(unmapped)"
    assert verdicts["landlock"] == "verified"
