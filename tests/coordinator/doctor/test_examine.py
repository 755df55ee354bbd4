"""The examination: what hangs or breaks is a finding, and the words for people and programs."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.cli import doctor
from coordinator.cli.main import main
from coordinator.config import Config
from coordinator.doctor.examine import Check, Finding, Patient, bad, examine, ok, plain, render, warn, well

HERE = Patient(Config(), "", Path("/nowhere"))


def test_findings_come_in_the_order_of_the_table() -> None:
    second = threading.Event()

    def late(_: Patient) -> Iterator[Finding]:
        assert second.wait(60)
        yield ok("a", "Fine.")

    def soon(_: Patient) -> Iterator[Finding]:
        yield warn("b", "Well.", "Look.")
        second.set()

    found = examine(HERE, (Check("a", late, within_s=120.0), Check("b", soon, within_s=120.0)))
    assert [(one.name, one.verdict) for one in found] == [("a", "ok"), ("b", "warn")]
    assert well(found)


def test_what_hangs_and_what_breaks_is_a_finding() -> None:
    never = threading.Event()

    def hangs(_: Patient) -> Iterator[Finding]:
        never.wait(120)
        yield ok("x", "Too late.")

    def breaks(_: Patient) -> list[Finding]:
        raise OSError("The disk\nsmokes.")

    found = examine(HERE, (Check("x", hangs, within_s=0.05), Check("y", breaks, within_s=60.0)))
    never.set()
    assert [one.verdict for one in found] == ["bad", "bad"]
    assert "no answer within 0.05 s" in found[0].sentence
    assert "The disk." in found[1].sentence
    assert not well(found)


def test_words_for_people_and_programs() -> None:
    found = [ok("one", "Fine."), warn("second", "So so.", "Do this."), bad("z", "Broken.", "Mend it.")]
    lines = render(plain(found)["checks"]).splitlines()
    assert lines[0] == "ok    one     Fine."
    assert lines[1] == "warn  second  So so."
    assert lines[2].strip() == "Do this."
    assert lines[-1] == "3 checks: 1 bad, 1 warning."
    assert plain(found)["ok"] is False


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("COORDINATOR_STORE", raising=False)
    monkeypatch.setattr(doctor, "CHECKS", tuple(check._replace(within_s=120.0) for check in doctor.CHECKS))
    command = ["doctor", "--state", str(tmp_path / "state"), "--listen", "127.0.0.1:0", "--json"]
    main(command)  # how full the disk is here decides about 0 or 1
    found = json.loads(capsys.readouterr().out)
    verdicts = {check["name"]: check["verdict"] for check in found["checks"] if not check["name"].startswith("disk")}
    assert verdicts.pop("limits") in ("ok", "warn")
    assert verdicts == {"store": "ok", "state": "ok", "blobs": "ok", "port": "ok"}
    broken = ["doctor", "--state", str(tmp_path), "--store", "mysql://nobody", "--listen", "127.0.0.1:0"]
    assert main(broken) == 1
    assert "Expected postgres://" in capsys.readouterr().out
