from __future__ import annotations

import sys

import pytest

from supervisor.errors import ExitCode, NoPermission
from supervisor.service_backend import ENDINGS, ServiceFailed, call, reason_of, rehearse, write_unit
from supervisor.service_units import ServicePlan


def test_a_call_tells_code_and_words():
    done = call(sys.executable, "-c", "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)")
    assert (done.code, done.out, done.err, done.words()) == (3, "out\n", "err", "err")
    assert call(sys.executable, "-c", "print('only this')").words() == "only this"
    assert call(sys.executable, "-c", "raise SystemExit(9)").words() == "exit code 9"


def test_a_call_that_hangs_is_ended():
    assert call(sys.executable, "-c", "import time; time.sleep(60)", deadline_s=0.2).code == -1


def test_a_program_that_is_not_there_is_a_sentence():
    with pytest.raises(ServiceFailed, match="/nonexistent/systemctl cannot be run"):
        call("/nonexistent/systemctl")


def test_a_unit_is_replaced_as_a_whole_and_only_when_it_is_ours(tmp_path):
    path = tmp_path / "deep" / "b.service"
    assert write_unit(path, b"MARK one", b"MARK")
    assert not write_unit(path, b"MARK one", b"MARK")
    assert write_unit(path, b"MARK two", b"MARK")
    assert path.read_bytes() == b"MARK two"
    assert path.stat().st_mode & 0o777 == 0o644
    assert [each.name for each in path.parent.iterdir()] == ["b.service"]
    path.write_bytes(b"somebody else's")
    with pytest.raises(ServiceFailed, match="not written by us"):
        write_unit(path, b"MARK three", b"MARK")
    assert path.read_bytes() == b"somebody else's"


def test_a_folder_that_is_none_is_no_permission(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(NoPermission, match="cannot be written"):
        write_unit(tmp_path / "file" / "b.service", b"MARK", b"MARK")


def test_every_ending_has_its_words():
    commands_only = {ExitCode.STOPPED, ExitCode.FAILED, ExitCode.NOT_RUNNING}
    assert set(ENDINGS) == set(ExitCode) - commands_only
    assert reason_of(78) == "It ended with exit code 78: worker.toml has mistakes: supervisor config check."
    assert reason_of(203) == "It ended with exit code 203."
    assert reason_of(None) == reason_of(0) == ""


def test_a_rehearsal_reads_the_configuration_with_a_bare_environment(tmp_path, monkeypatch):
    config = tmp_path / "a b.toml"
    config.write_text("[limits]\ndrain_s = 5\n")
    plan = ServicePlan(name="b", python=sys.executable, config=str(config))
    assert rehearse(plan, [], {}).code == 0
    monkeypatch.setenv("BULKHEAD__LIMITS__DRAIN_S", "7")
    config.write_text("[limits]\ndrain_s = 0\n")
    done = rehearse(plan, [], {})
    assert done.code == ExitCode.BAD_CONFIG, "the shell's variable would have hidden the mistake"
    assert "limits.drain_s" in done.err
