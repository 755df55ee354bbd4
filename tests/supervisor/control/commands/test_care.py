"""`supervisor diagnostics`: a file of its own, never over another one."""

from __future__ import annotations

import json
import re
import stat
import tarfile
from typing import IO

import pytest

from supervisor import doctor_run
from supervisor.cli import main
from supervisor.control.commands import care
from supervisor.control.commands.layout import Paper


async def test_a_bundle_with_a_name_of_the_day(box, types, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert await types("diagnostics") == 0
    (path,) = tmp_path.glob("bulkhead-diagnostics-*.tar.gz")
    assert re.fullmatch(r"bulkhead-diagnostics-\d{4}-\d\d-\d\dT\d{6}\.tar\.gz", path.name)
    assert path.read_bytes() == b"a bundle"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.name in capsys.readouterr().out


async def test_for_programs(box, types, capsys, tmp_path):
    assert await types("diagnostics", "-o", str(tmp_path / "b"), "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(tmp_path / "b"), "bytes": 8, "running": True}


async def test_nothing_is_overwritten(box, types, capsys, tmp_path):
    (tmp_path / "b").write_text("mine")
    assert await types("diagnostics", "-o", str(tmp_path / "b")) == 1
    assert "is not overwritten" in capsys.readouterr().err
    assert (tmp_path / "b").read_text() == "mine"


async def test_a_place_that_cannot_be_written(box, types, capsys, tmp_path):
    assert await types("diagnostics", "-o", str(tmp_path / "none" / "b")) == 77
    assert "cannot be written" in capsys.readouterr().err


async def test_no_half_a_bundle_is_left(box, types, capsys, tmp_path, monkeypatch):
    def full(_socket: object, _route: str, out: IO[bytes], *, patience_s: float) -> int:
        out.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(care, "fetch", full)
    assert await types("diagnostics", "-o", str(tmp_path / "b")) == 77
    assert "No space left" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("text", ['[control]\nsocket = "none.sock"\n[worker]\nstate_dir = "."\n', "[broken\n"])
def test_without_a_supervisor(tmp_path, monkeypatch, capsys, text):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "worker.toml").write_text(text)
    words = ["diagnostics", "--config", str(tmp_path / "worker.toml"), "-o", str(tmp_path / "b")]
    assert main(words) == 0
    assert "No supervisor is running" in capsys.readouterr().out
    with tarfile.open(tmp_path / "b") as bundle:
        (about,) = [name for name in bundle.getnames() if name.endswith("about.json")]
        member = bundle.extractfile(about)
        assert member is not None
        assert json.load(member)["running"] is False


def test_without_a_configuration(tmp_path, capsys):
    assert main(["diagnostics", "--config", str(tmp_path / "none.toml"), "-o", str(tmp_path / "b")]) == 78
    assert not (tmp_path / "b").exists()


# ---- doctor

FOUND = {
    "ok": False,
    "running": True,
    "checks": [
        {"name": "config", "verdict": "ok", "sentence": "worker.toml has no mistakes.", "cure": ""},
        {"name": "clock", "verdict": "warn", "sentence": "It is not kept in step.", "cure": "Start chronyd."},
        {
            "name": "gpu",
            "verdict": "fail",
            "sentence": "The driver\x1b[2J is too old. " * 4,
            "cure": "Install another.",
        },
    ],
}


def test_doctor(monkeypatch, capsys, tmp_path):
    given = []
    monkeypatch.setattr(doctor_run, "examined_here", lambda config: given.append(config) or FOUND)
    assert main(["doctor", "--config", "w.toml"]) == 1
    assert given == ["w.toml"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "ok    config: worker.toml has no mistakes.",
        "warn  clock: It is not kept in step.",
        "      Start chronyd.",
    ]
    assert lines[-1] == "3 checks: 1 failed, 1 warning."
    monkeypatch.setattr(doctor_run, "examined_here", lambda _config: {"ok": True, "running": False, "checks": []})
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


def test_doctor_fits_the_terminal():
    text = care.examined(FOUND, Paper(40))
    assert max(map(len, text.splitlines())) <= 40
    assert "\x1b" not in text
    assert "\x1b[31mFAIL\x1b[0m  gpu: The driver" in care.examined(FOUND, Paper(80, colour=True))
