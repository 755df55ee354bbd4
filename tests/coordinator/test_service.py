"""The unit's text, as systemd itself judges it, and the word to systemd."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator.service import MARK, ServicePlan, notify, unit, unreachable


def settings(text: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#"))


def test_a_plain_unit() -> None:
    text = unit(ServicePlan(python="/opt/bulkhead/bin/python"))
    found = settings(text)
    assert text.startswith(MARK)
    assert found["ExecStart"] == ":/opt/bulkhead/bin/python -P -m coordinator serve"
    assert (found["DynamicUser"], found["ProtectHome"], found["PrivateTmp"]) == ("yes", "yes", "yes")
    assert found["CapabilityBoundingSet"] == found["AmbientCapabilities"] == ""
    assert found["RestartPreventExitStatus"] == "64 73 78"
    assert found["TimeoutStopSec"] == "45"


def test_secrets_are_handed_over() -> None:
    plan = ServicePlan(
        python="/opt/my python/bin/python",
        config="/etc/bulkhead/50%.toml",
        credentials={"tls.key": "/etc/tls/key"},
        port=443,
        environment="/etc/bulkhead/env",
    )
    text = unit(plan)
    found = settings(text)
    command = ':"/opt/my python/bin/python" -P -m coordinator serve --config %d/coordinator.toml'
    assert found["ExecStart"] == command
    assert "LoadCredential=coordinator.toml:/etc/bulkhead/50%%.toml" in text
    assert "LoadCredential=tls.key:/etc/tls/key" in text
    assert found["CapabilityBoundingSet"] == "CAP_NET_BIND_SERVICE"


def test_the_program_does_not_vanish() -> None:
    assert settings(unit(ServicePlan(python="/home/me/venv/bin/python")))["ProtectHome"] == "read-only"
    linked = ServicePlan(python="/opt/venv/bin/python", places=("/root/.local/python",))
    assert settings(unit(linked))["ProtectHome"] == "read-only"
    assert settings(unit(ServicePlan(python="/tmp/venv/bin/python")))["PrivateTmp"] == "no"


def test_systemd_finds_nothing_wrong(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze, which judges the unit, is not installed")
    (tmp_path / "coordinator.toml").touch()
    place = tmp_path / "bulkhead-coordinator.service"
    plan = ServicePlan(python=sys.executable, config=str(tmp_path / "coordinator.toml"), port=443)
    place.write_text(unit(plan))
    judged = subprocess.run([analyze, "verify", "--man=no", str(place)], capture_output=True, text=True, check=False)
    about_us = [line for line in judged.stderr.splitlines() if place.name in line]
    assert (judged.returncode, about_us) == (0, [])


def test_a_folder_that_others_may_not_pass(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    (closed / "bin").mkdir(parents=True)
    for folder in (tmp_path, *tmp_path.parents):
        if not folder.stat().st_mode & 0o001:
            assert unreachable(str(closed / "bin" / "python")) != ""
            return
    closed.chmod(0o700)
    assert unreachable(str(closed / "bin" / "python")) == str(closed)
    closed.chmod(0o755)
    assert unreachable(str(closed / "bin" / "python")) == ""


def test_systemd_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify("READY=1")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
        ear.bind(str(tmp_path / "s"))
        ear.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "s"))
        assert notify("READY=1")
        assert ear.recv(100) == b"READY=1"
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    assert not notify("READY=1")
