"""Attacks by an engine that nothing contains: each attempt is real, so that a refusal elsewhere means something."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from protocol.engine_wire import Model

MODULE = "engines.synthetic.misbehave"


@pytest.fixture
def child(spawn):
    child = spawn(MODULE)
    child.load(Model(name="synthetic-bad", device="cpu"))
    yield child
    child.process.kill()


@pytest.fixture
def victim():
    """A process that waits for ever."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", "import signal; print(flush=True); signal.pause()"], stdout=-1
    )
    assert process.stdout is not None
    process.stdout.read(1)
    yield process.pid
    process.stdout.close()
    process.kill()
    process.wait(60)


def _told(child, prompt):
    return json.loads(child.run("llm", {"prompt": prompt}).body.content)


def test_spying_works_on_whom_it_may(child, victim):
    told = _told(child, f"spy:{victim}")
    assert {"command line", "environment", "memory", "working folder"} <= {*told["managed"]}
    # It does not stop its victim, and lets go with its end.
    until = time.monotonic() + 60
    while (state := Path(f"/proc/{victim}/stat").read_text().split()[2]) == "R":  # it may not have had its turn yet
        assert time.monotonic() < until
        time.sleep(0.01)
    assert state == "S"


def test_spying_on_nobody_is_refused(child):
    told = _told(child, f"spy:{2**22 - 1}")
    assert told["managed"] == []
    assert told["refused"]["command line"] == "ENOENT"


def test_signals_arrive(child):
    got = []
    before = signal.signal(signal.SIGURG, lambda number, frame: got.append(number))
    try:
        told = _told(child, f"signal:{os.getpid()}")
    finally:
        signal.signal(signal.SIGURG, before)
    assert told["managed"] == ["kill", "tkill", "pidfd_send_signal"]
    assert got


def test_meddling_changes_nothing_even_where_it_works(child, victim):
    before = (os.getpriority(os.PRIO_PROCESS, victim), os.sched_getaffinity(victim))
    told = _told(child, f"meddle:{victim}")
    assert {"nice", "affinity", "limits"} <= {*told["managed"]}
    assert (os.getpriority(os.PRIO_PROCESS, victim), os.sched_getaffinity(victim)) == before


def test_a_home_is_read_listed_written_and_bereft(child, tmp_path):
    secret = tmp_path / "home" / "secret.txt"
    secret.parent.mkdir()
    secret.write_text("the words")
    told = _told(child, f"home:{secret}")
    assert told["managed"] == ["read", "list", "write", "remove"]
    assert told["seen"] == ["the words"]
    assert not secret.exists()
    assert [path.name for path in secret.parent.iterdir()] == ["secret.txt.left"]


def test_files_are_left_where_they_can_be(child, tmp_path):
    told = _told(child, f"leave:{tmp_path / 'a'},{tmp_path / 'no' / 'b'}")
    assert told == {"managed": [str(tmp_path / "a")], "refused": {str(tmp_path / "no" / "b"): "ENOENT"}}
    assert (tmp_path / "a").exists()


def test_sockets_reach_whoever_listens(child, tmp_path):
    tcp, udp, unix = (
        socket.create_server(("127.0.0.1", 0)),
        socket.socket(type=socket.SOCK_DGRAM),
        socket.socket(socket.AF_UNIX),
    )
    with tcp, udp, unix:
        udp.bind(("127.0.0.1", 0))
        unix.bind(str(tmp_path / "plug"))
        unix.listen()
        addresses = f"{tcp.getsockname()[1]},{udp.getsockname()[1]},{tmp_path / 'plug'},nobody"
        told = _told(child, f"sockets:{addresses}")
        assert {"TCP", "UDP", "unix socket", "listen"} <= {*told["managed"]}
        assert told["refused"] == {"abstract socket": "ECONNREFUSED"}
        udp.settimeout(60)
        assert udp.recv(8) == b"x"


def test_a_neighbours_file_is_wrecked(child, tmp_path):
    file = tmp_path / "theirs" / "work.bin"
    file.parent.mkdir()
    file.write_text("work")
    assert _told(child, f"wreck:{file}")["managed"] == ["read", "list", "overwrite", "remove"]
    assert not file.exists()


def test_a_link_is_handed_out_as_an_output(child, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("12345")
    answer = child.run("llm", {"prompt": f"symlink:{secret},5"})
    (file,) = answer.result.files
    assert file.size == 5
    assert (answer.folder / file.name).readlink() == secret
