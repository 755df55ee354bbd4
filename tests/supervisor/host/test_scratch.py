"""A scratch folder is measured for what it takes, whatever its owner does to hide it."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest
import trio

from supervisor.host import scratch
from supervisor.host.removal import remove_tree
from supervisor.host.scratch import Usage, Watch, hidden_bytes, measure, size_bytes

posix = pytest.mark.skipif(sys.platform == "win32", reason="links, holes and descriptors are POSIX's")
KIB = 2**10
# Folders themselves and the last block of each file.
SLACK = 256 * KIB


def fill(path: Path, size: int) -> Path:
    path.write_bytes(os.urandom(size))
    with path.open("rb") as file:
        os.fsync(file.fileno())  # some file systems allocate late
    return path


def test_files_in_folders_are_added_up(tmp_path: Path):
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    fill(tmp_path / "one", 512 * KIB)
    fill(below / "two", 256 * KIB)
    usage = measure(tmp_path)
    assert usage.entries == 4
    assert usage.unseen == ""
    assert 768 * KIB <= usage.size_bytes <= 768 * KIB + SLACK
    assert size_bytes(tmp_path) == usage.size_bytes


@posix
def test_a_hole_takes_nothing_and_a_file_with_two_names_counts_once(tmp_path: Path):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**40)
    fill(tmp_path / "one", 512 * KIB)
    (tmp_path / "other").hardlink_to(tmp_path / "one")
    assert 512 * KIB <= size_bytes(tmp_path) <= 512 * KIB + SLACK


@posix
def test_links_are_not_followed_nor_rounds_walked(tmp_path: Path):
    folder = tmp_path / "scratch"
    folder.mkdir()
    fill(tmp_path / "outside", 1024 * KIB)
    (folder / "file").symlink_to(tmp_path / "outside")
    (folder / "round").symlink_to(folder)
    (folder / "up").symlink_to(tmp_path)
    assert measure(folder).entries == 3
    assert size_bytes(folder) <= SLACK
    assert measure(folder / "up") == Usage(0, 0)  # not even when it is what we were given


def test_work_is_bounded(tmp_path: Path):
    for number in range(50):
        (tmp_path / str(number)).touch()
    assert measure(tmp_path, max_entries=20).unseen == "more than 20 files"
    assert measure(tmp_path, max_entries=50).unseen == ""


@posix
def test_a_chain_too_long_for_a_path_is_told(tmp_path: Path):
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(30):
        os.mkdir("x" * 200, dir_fd=here)
        below = os.open("x" * 200, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    usage = measure(tmp_path)
    assert usage.unseen == "a path that is too long"
    watch = Watch(tmp_path, 2**40)
    watch.usage = usage
    assert watch.exceeded
    assert watch.describe() == "Its scratch folder cannot be measured: it holds a path that is too long."
    assert remove_tree(tmp_path / ("x" * 200))  # pytest removes its folders by path


@posix
@pytest.mark.skipif(sys.platform != "win32" and os.geteuid() == 0, reason="nothing is hidden from root")
def test_a_folder_that_is_closed_to_its_owner_is_told(tmp_path: Path):
    (tmp_path / "closed").mkdir(mode=0o000)
    assert measure(tmp_path).unseen == "a folder that its owner may not read"
    (tmp_path / "closed").chmod(0o700)


def test_what_is_not_there_takes_nothing(tmp_path: Path):
    assert measure(tmp_path / "nowhere") == Usage(0, 0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_removed_file_that_is_still_open_counts(tmp_path: Path):
    path = fill(tmp_path / "gone", 512 * KIB)
    with path.open("rb") as first, path.open("rb"):
        assert hidden_bytes(tmp_path, [os.getpid()]) == 0
        path.unlink()
        assert size_bytes(tmp_path) == 0
        assert 512 * KIB <= hidden_bytes(tmp_path, [os.getpid(), os.getpid()]) <= 512 * KIB + SLACK
        assert first.fileno() >= 0
    assert hidden_bytes(tmp_path, [os.getpid(), 2**22 + 5]) == 0
    assert hidden_bytes(tmp_path / "nowhere", [os.getpid()]) == 0


async def test_a_watch_knows_when_its_limit_was_passed(tmp_path: Path):
    watch = Watch(tmp_path, 300 * KIB)
    fill(tmp_path / "one", 100 * KIB)
    await watch.measure()
    assert not watch.exceeded
    fill(tmp_path / "two", 300 * KIB)
    await watch.measure()
    assert watch.exceeded
    assert "limits.scratch_gb" in watch.describe()


async def test_a_watch_counts_what_its_processes_hide(tmp_path: Path):
    path = fill(tmp_path / "gone", 512 * KIB)
    watch = Watch(tmp_path, 300 * KIB, pids=lambda: [os.getpid()])
    with path.open("rb"):
        path.unlink()
        assert (await watch.measure()).size_bytes >= (512 * KIB if sys.platform.startswith("linux") else 0)
    assert (await watch.measure()).size_bytes == 0


async def test_a_file_system_that_hangs_costs_one_thread_and_not_all_of_them(tmp_path, monkeypatch):
    begun: list[Path] = []
    hangs, thawed = trio.Event(), threading.Event()

    def hang(folder: Path, *_more: object) -> Usage:
        begun.append(folder)
        trio.from_thread.run_sync(hangs.set)
        thawed.wait(60)
        return Usage(1, 1)

    monkeypatch.setattr(scratch, "measure", hang)
    watch = Watch(tmp_path, 100)
    try:
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch.measure)
                await hangs.wait()
                nursery.cancel_scope.cancel()
        for _ in range(4):
            with trio.move_on_after(0.02):
                await watch.measure()
        assert len(begun) == 1
    finally:
        thawed.set()
    with trio.fail_after(20):
        await watch.measure()
    assert len(begun) == 2
