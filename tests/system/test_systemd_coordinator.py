"""`coordinator service` under a real systemd (systemd_box.py): installed, hardened, serving, drained, removed."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

_spec = importlib.util.spec_from_file_location(
    "tests_systemd_box_coordinator", Path(__file__).with_name("systemd_box.py")
)
assert _spec is not None
assert _spec.loader is not None
boxes: ModuleType = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = boxes
_spec.loader.exec_module(boxes)

pytestmark = [pytest.mark.systemd, pytest.mark.skipif(bool(boxes.missing()), reason=boxes.missing() or "there is one")]

UNIT = "bulkhead-coordinator.service"
TOML = 'listen = "127.0.0.1:8443"\nlog_format = "json"\ndrain_s = 2\n'
_ASK = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8443/healthz', timeout=10).read().decode())"


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One box for the module."""
    with boxes.booted(tmp_path_factory.mktemp("box")) as booted:
        yield booted


def test_from_install_to_uninstall(box: Any) -> None:
    box.ok("mount", "--make-rshared", "/")  # as on any machine that systemd booted; credentials are mounted so
    box.write("/etc/bulkhead/coordinator.toml", TOML, mode=0o600)  # root's alone: systemd hands it over
    command = (sys.executable, "-P", "-m", "coordinator", "service")
    done = box.run((*command, "install", "--config", "/etc/bulkhead/coordinator.toml"))
    assert done.returncode == 0, done.stderr + box.log(UNIT)
    # `install` came back, so systemd has heard READY=1: by then it must serve.
    assert box.show(UNIT, "ActiveState")["ActiveState"] == "active"
    assert json.loads(box.ok(sys.executable, "-c", _ASK)) == {"status": "ok"}
    shown = box.show(UNIT, "MainPID", "DynamicUser", "NRestarts")
    assert (shown["DynamicUser"], shown["NRestarts"]) == ("yes", "0")
    status = box.ok("cat", f"/proc/{shown['MainPID']}/status")
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    assert int(fields["Uid"].split()[0]) > 0
    assert int(fields["CapEff"], 16) == 0
    assert (fields["NoNewPrivs"].strip(), fields["Seccomp"].strip()) == ("1", "2")
    assert box.ok("stat", "-c", "%a", "/var/lib/private/bulkhead-coordinator/client.key").strip() == "600"
    assert box.run(("systemctl", "stop", UNIT)).returncode == 0
    assert box.show(UNIT, "Result")["Result"] == "success"
    assert box.run((*command, "uninstall")).returncode == 0
    assert box.run(("test", "-e", f"/etc/systemd/system/{UNIT}")).returncode != 0
    assert box.run(("test", "-e", "/var/lib/private/bulkhead-coordinator/client.key")).returncode == 0
