from __future__ import annotations

import errno
import os
import resource
import signal
import stat
import subprocess
import sys

import msgspec
import pytest

from protocol.ids import is_safe_id
from supervisor.errors import ExitCode, IdentityHeld, NoPermission, SupervisorError
from supervisor.state import hold_state, write_atomically, write_endpoint


def test_one_process_holds_the_folder_and_says_who(tmp_path):
    script = f"""
import sys
from pathlib import Path
from supervisor.state import hold_state
with hold_state(Path({str(tmp_path / "state")!r})):
    print("held", flush=True)
    sys.stdin.read()
"""
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"held\n"
    with pytest.raises(IdentityHeld, match=f"pid {child.pid}; stop that one") as caught, hold_state(tmp_path / "state"):
        pass
    assert caught.value.exit_code == ExitCode.IDENTITY_HELD
    child.communicate(b"")
    with hold_state(tmp_path / "state"):
        pass


def test_a_dead_holder_does_not_keep_the_folder(tmp_path):
    (tmp_path / "lock").write_text("999999\n")
    with hold_state(tmp_path):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NoPermission, match="Not a directory; give this user"), hold_state(tmp_path / "file" / "state"):
        pass


def test_the_worker_id_is_made_once_and_kept(tmp_path):
    with hold_state(tmp_path) as state:
        made = state.worker_id("")
        assert is_safe_id(made)
        assert state.worker_id("") == made
        assert state.worker_id("given") == "given"
        (tmp_path / "worker-id").write_text("../../etc\n")
        assert is_safe_id(state.worker_id(""))


def test_what_an_earlier_life_left_of_its_probes_goes(tmp_path):
    (tmp_path / "probes" / "bh-probe-x").mkdir(parents=True)
    with hold_state(tmp_path) as state:
        assert list(state.empty_probes().iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has engines of another user")
def test_engines_of_root_may_pass_through_to_their_own_folders_and_list_nothing(tmp_path):
    with hold_state(tmp_path / "state") as state:
        assert stat.S_IMODE(state.root.stat().st_mode) == 0o711
        assert stat.S_IMODE(state.empty_probes().stat().st_mode) == 0o711


def test_the_endpoint_file(tmp_path):
    path = tmp_path / "endpoint.json"
    write_endpoint(path, "http://127.0.0.1:1", "/key")
    assert msgspec.json.decode(path.read_bytes()) == {
        "url": "http://127.0.0.1:1",
        "client_key_file": "/key",
        "pid": os.getpid(),
    }
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_told_with_the_cure(tmp_path, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(SupervisorError, match="No space left on device; make room there and start again") as told:
        with hold_state(tmp_path):
            pass
    assert told.value.exit_code == ExitCode.INTERNAL, "a service manager tries again"
    monkeypatch.undo()
    with hold_state(tmp_path):
        pass


def test_a_disk_that_refuses_keeps_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "holds.json"
    write_atomically(path, b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        with pytest.raises(OSError):
            write_atomically(path, b"x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_bytes() == b"old"
    assert [found.name for found in tmp_path.iterdir()] == ["holds.json"]
