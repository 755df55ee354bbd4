"""Folders that their former owner has prepared for whoever removes them."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest

from supervisor.host.removal import empty_tree, remove_below, remove_tree

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="folders are not removed by descriptor there")


def plain_user(work) -> int:
    """Run `work` in a child that is not root, for whom permissions count; returns its exit code."""
    pid = os.fork()
    if pid == 0:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setresgid(12345, 12345, 12345)
                os.setresuid(12345, 12345, 12345)
            os._exit(0 if work() else 1)
        except BaseException:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def reachable():
    """A folder in which every user may work; pytest keeps its own to its user."""
    with tempfile.TemporaryDirectory(prefix="bulkhead-test-") as name:
        Path(name).chmod(0o777)
        yield Path(name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "out"
    made.mkdir()
    return made


def test_nothing_there_is_as_good_as_removed(tmp_path: Path):
    assert remove_tree(tmp_path / "none")
    assert remove_tree(tmp_path / "none" / "deeper")


def test_links_are_removed_and_what_they_lead_to_stays(folder: Path, tmp_path: Path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").write_text("x")
    (folder / "a").mkdir()
    (folder / "a/link").symlink_to(tmp_path / "precious")
    (folder / "file").symlink_to(tmp_path / "precious/file")
    os.mkfifo(folder / "pipe")
    (folder / "sub/sub").mkdir(parents=True)
    (folder / "sub/sub/file").touch()
    assert remove_tree(folder)
    assert not folder.exists()
    assert (tmp_path / "precious/file").read_text() == "x"


def test_the_folder_itself_swapped_for_a_link(folder: Path, tmp_path: Path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").touch()
    folder.rmdir()
    folder.symlink_to(tmp_path / "precious")
    assert remove_tree(folder)
    assert not folder.is_symlink()
    assert (tmp_path / "precious/file").exists()


def test_a_chain_deeper_than_any_path_and_any_recursion(folder: Path):
    at = os.open(folder, os.O_RDONLY)
    for _ in range(5000):
        os.mkdir("d", dir_fd=at)
        below = os.open("d", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=at))
    os.close(at)
    assert remove_tree(folder)
    assert not folder.exists()


def test_folders_without_permissions(reachable: Path):
    def work() -> bool:
        folder = reachable / "out"
        (folder / "closed/inner").mkdir(parents=True)
        (folder / "closed/inner/file").touch()
        (folder / "readable/inner").mkdir(parents=True)
        for name, mode in (("closed/inner", 0), ("closed", 0), ("readable/inner", 0o500), ("readable", 0o500)):
            (folder / name).chmod(mode)
        folder.chmod(0)
        return remove_tree(folder) and not folder.exists()

    assert plain_user(work) == 0


def test_what_cannot_be_removed_is_told_and_soon(reachable: Path):
    (reachable / "theirs").mkdir()
    (reachable / "theirs/file").touch()
    if os.geteuid() == 0:
        assert plain_user(lambda: not remove_tree(reachable / "theirs")) == 0
    assert not remove_tree(reachable / "theirs", patience_s=-1.0)
    assert remove_tree(reachable / "theirs")


def test_an_engine_that_makes_files_as_fast_as_they_go_does_not_hold_us(folder: Path):
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        number = 0
        while True:
            number += 1
            try:
                os.close(os.open(folder / str(number), os.O_CREAT | os.O_WRONLY))
            except OSError:
                os._exit(0)
            if number == 1:
                os.write(told, b"x")
    os.read(ready, 1)
    try:
        remove_tree(folder, patience_s=0.5)
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        os.close(ready)
        os.close(told)
    assert remove_tree(folder)


def test_below_an_open_folder(folder: Path, tmp_path: Path):
    (folder / "x").touch()
    fd = os.open(tmp_path, os.O_RDONLY)
    assert remove_below(fd, "out")
    assert remove_below(fd, "out")
    os.close(fd)


def test_emptied(folder: Path):
    (folder / "x").touch()
    assert empty_tree(folder)
    assert list(folder.iterdir()) == []
    assert folder.stat().st_mode & 0o777 == 0o700
