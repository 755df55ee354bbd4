"""Traces and canaries: what is touched is noticed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from supervisor.selftest_traces import Canaries, Ourselves, alive, files_below, marked, open_canaries


def test_processes_are_found_by_their_mark_until_they_are_gone():
    environment = {**os.environ, "A_MARK": "mine"}
    process = subprocess.Popen([sys.executable, "-I", "-S", "-c", "input()"], env=environment, stdin=subprocess.PIPE)
    try:
        (trace,) = found = marked("A_MARK", "mine")
        assert trace.pid == process.pid
        assert marked("A_MARK", "other") == set()
        assert alive(found) == found
        assert alive({trace._replace(began=0.0)}) == set()  # another process with that pid
    finally:
        process.kill()
        process.communicate()
    assert alive(found) == set()


def test_a_zombie_is_no_process_any_more():
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", "input()"], env={"A_MARK": "z"}, stdin=subprocess.PIPE
    )
    found = marked("A_MARK", "z")
    assert len(found) == 1
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert alive(found) == set()
    process.communicate()


def test_files_below_are_files_links_and_sockets_and_no_folders(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert files_below(tmp_path) == []
    (tmp_path / "a" / "file").touch()
    (tmp_path / "a" / "link").symlink_to(tmp_path)
    assert sorted(files_below(tmp_path)) == ["a/file", "a/link"]


@pytest.fixture
def planted(tmp_path):
    canaries = Canaries(tmp_path)
    (tmp_path / "instances").mkdir()
    canaries.plant()
    return canaries


def test_untouched_canaries_are_unharmed(planted):
    assert planted.harmed() == []


def test_a_touched_file_is_noticed(planted):
    planted.secret.write_text("x")
    (planted.secret.parent / "new").touch()
    (planted.neighbours / "work.bin").unlink()
    found = "; ".join(planted.harmed())
    assert "the user's file was changed" in found
    assert "new in the user's folder: new" in found
    assert "another engine's file is gone" in found


def test_strays_are_noticed_and_removed(planted):
    paths = [Path(word) for word in planted.fill_in("{strays}").split(",")]
    assert Path("/dev/shm") in {path.parent for path in paths}
    assert Path.home() in {path.parent for path in paths}
    paths[0].touch()
    assert planted.harmed() == [f"{paths[0].parent} was written to"]
    assert not paths[0].exists()


def test_a_changed_nice_value_of_ours_is_noticed(planted, monkeypatch):
    changed = Ourselves.now()._replace(nice=19)
    monkeypatch.setattr(Ourselves, "now", lambda: changed)
    assert planted.harmed() == [f"our nice went from {planted._before.nice} to 19"]


def test_the_secret_is_known_when_it_comes_out(planted):
    assert planted.knows(f"xx {planted.secret.read_text()} yy")
    assert not planted.knows("anything else")


async def test_whoever_reaches_a_listener_is_noticed(tmp_path):
    async with open_canaries(tmp_path, sockets=True, signals=False) as canaries:
        tcp, udp, path, abstract = canaries.fill_in("{sockets}").split(",")
        with trio.socket.socket() as plug:
            await plug.connect(("127.0.0.1", int(tcp)))
        with trio.socket.socket(type=socket.SOCK_DGRAM) as plug:
            await plug.sendto(b"x", ("127.0.0.1", int(udp)))
        for address in (path, f"\0{abstract}"):
            with trio.socket.socket(socket.AF_UNIX) as plug:
                await plug.connect(address)
        with trio.fail_after(60):
            while len(canaries.touched) < 4:  # noqa: ASYNC110  four tasks, no event
                await trio.sleep(0.001)
    assert len({*canaries.touched}) == 4


async def test_a_signal_is_noticed(tmp_path):
    async with open_canaries(tmp_path, sockets=False, signals=True) as canaries:
        os.kill(os.getpid(), signal.SIGURG)
        with trio.fail_after(60):
            while not canaries.touched:  # noqa: ASYNC110
                await trio.sleep(0.001)
    assert canaries.touched == ["SIGURG reached the supervisor"]
