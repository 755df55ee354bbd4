"""The file of the log: rotated, renamed under us, on a disk that is full, slow, gone."""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from supervisor.observe.logfile import LogFile

PATIENCE_S = 30.0  # for what takes milliseconds where nothing else runs


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not written when `close` stops waiting is lost: too soon where other tests have the processor."""
    monkeypatch.setattr(LogFile.close, "__defaults__", (PATIENCE_S,))


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., LogFile]]:
    made: list[LogFile] = []

    def make(max_bytes: int = 1000, keep: int = 2, path: Path | None = None, **more: float) -> LogFile:
        file = LogFile(path or tmp_path / "log" / "w.log", max_bytes, keep, retry_s=more.pop("retry_s", 0.01), **more)
        made.append(file)
        return file

    yield make
    for file in made:
        file.close()


def settled(check: Callable[[], bool]) -> None:
    """Wait until the thread has done it."""
    until = time.monotonic() + PATIENCE_S
    while not check():
        assert time.monotonic() < until, f"the log's thread did not do it in {PATIENCE_S:g} s"
        threading.Event().wait(0.002)


def empty(file: LogFile) -> bool:
    return not file._lines


def test_lines_arrive_in_order_and_only_we_may_read_them(opened, tmp_path: Path) -> None:
    file = opened(10**6)
    for n in range(1000):
        file.put(f"line {n}")
    file.close()
    path = tmp_path / "log" / "w.log"
    assert path.read_text().splitlines() == [f"line {n}" for n in range(1000)]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert file.dropped == 0
    file.put("late")
    assert file.dropped == 1


def test_it_rotates_between_lines_and_keeps_so_many(opened, tmp_path: Path) -> None:
    file = opened(max_bytes=100, keep=2)
    for n in range(60):
        file.put(f"{n:09}")
    file.close()
    folder = tmp_path / "log"
    assert sorted(os.listdir(folder)) == ["w.log", "w.log.1", "w.log.2"]
    text = "".join((folder / name).read_text() for name in ("w.log.2", "w.log.1", "w.log"))
    assert text.splitlines() == [f"{n:09}" for n in range(30, 60)]
    assert all((folder / name).stat().st_size <= 100 for name in os.listdir(folder))


def test_keeping_none_starts_over(opened, tmp_path: Path) -> None:
    file = opened(max_bytes=100, keep=0)
    for n in range(15):
        file.put(f"{n:09}")
    file.close()
    assert os.listdir(tmp_path / "log") == ["w.log"]
    assert (tmp_path / "log" / "w.log").read_text().splitlines() == [f"{n:09}" for n in range(10, 15)]


def test_a_line_larger_than_the_file_is_written_whole(opened, tmp_path: Path) -> None:
    file = opened(max_bytes=100)
    file.put("a")
    file.put("b" * 500)
    file.put("c")
    file.close()
    assert (tmp_path / "log" / "w.log.1").read_text() == "b" * 500 + "\n"


def test_what_an_earlier_life_wrote_is_continued(opened, tmp_path: Path) -> None:
    path = tmp_path / "w.log"
    path.write_text("earlier\n")
    file = opened(path=path)
    file.put("now")
    file.close()
    assert path.read_text() == "earlier\nnow\n"


def test_a_file_that_is_full_already_is_rotated_first(opened, tmp_path: Path) -> None:
    path = tmp_path / "w.log"
    path.write_text("x" * 2000)
    file = opened(path=path)
    file.put("now")
    file.close()
    assert path.read_text() == "now\n"
    assert (tmp_path / "w.log.1").stat().st_size == 2000


def test_renamed_removed_and_truncated_under_us(opened, tmp_path: Path) -> None:
    path = tmp_path / "w.log"
    file = opened(path=path)
    file.put("one")
    settled(lambda: path.exists() and path.read_text() == "one\n")
    path.rename(tmp_path / "taken.log")
    file.put("two")
    settled(lambda: path.exists() and path.read_text() == "two\n")
    assert (tmp_path / "taken.log").read_text() == "one\n"
    path.unlink()
    file.put("three")
    settled(lambda: path.exists() and path.read_text() == "three\n")
    os.truncate(path, 0)
    file.put("four")
    settled(lambda: path.read_text() == "four\n")


def test_a_full_disk_loses_nothing_that_fits_into_memory_and_tears_no_line(
    opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "w.log"
    file = opened(10**6, path=path)
    real, full, tried = os.write, threading.Event(), threading.Event()

    def write(fd: int, data: bytes) -> int:
        if full.is_set() and os.fstat(fd).st_ino == os.stat(path).st_ino:
            if len(data) > 3:
                return real(fd, data[:3])  # the last blocks of the disk
            tried.set()
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data)

    file.put("before")
    settled(lambda: path.exists() and path.read_text() == "before\n")
    monkeypatch.setattr(os, "write", write)
    full.set()
    file.put("during one")
    assert tried.wait(PATIENCE_S)
    file.put("during two")
    settled(lambda: "cannot be written" in caplog.text)
    full.clear()
    settled(lambda: empty(file))
    assert path.read_text() == "before\nduring one\nduring two\n"
    assert caplog.text.count("No space left on device; its lines wait in memory") == 1
    assert file.dropped == 0


def test_a_disk_that_never_comes_back_costs_bounded_memory_and_no_time(
    opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_args: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    file = opened(path=tmp_path / "w.log", queue_bytes=1000, retry_s=60.0)
    monkeypatch.setattr(os, "ftruncate", refuse)
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: refuse() if b"filler" in data else real(fd, data))
    began = time.monotonic()
    for n in range(1000):
        file.put(f"filler {n:04}")
    assert file._bytes <= 1000
    assert file.dropped >= 900
    file.close()
    assert time.monotonic() - began < PATIENCE_S  # it tries again after 60 s
    assert file.dropped == 1000
    assert "Input/output error" in caplog.text


def test_losses_are_told_when_writing_works_again(opened, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "not yet"
    folder.write_text("a file where the folder should be")
    file = opened(path=folder / "w.log", queue_bytes=100)
    for n in range(20):
        file.put(f"{n:09}")
    settled(lambda: "cannot be written" in caplog.text)
    folder.unlink()
    settled(lambda: empty(file))
    file.put("again")
    settled(lambda: "10 lines were lost" in caplog.text)


def test_a_stuck_disk_holds_up_neither_the_caller_nor_the_end(
    opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck, release = threading.Event(), threading.Event()
    real = os.write

    def write(fd: int, data: bytes) -> int:
        if b"stuck" in data:
            stuck.set()
            release.wait(60)
        return real(fd, data)

    monkeypatch.setattr(os, "write", write)
    file = opened(path=tmp_path / "w.log")
    file.put("stuck")
    assert stuck.wait(PATIENCE_S)
    began = time.monotonic()
    for _ in range(100):
        file.put("x")
    file.close(0.05)
    assert time.monotonic() - began < PATIENCE_S  # the disk is stuck for 60 s
    release.set()
    file._thread.join(PATIENCE_S)
    assert not file._thread.is_alive()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_refused(opened, tmp_path: Path, make, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "w.log"
    make(path)
    file = opened(path=path)
    file.put("x")
    settled(lambda: "cannot be written" in caplog.text)
    file.close()
    assert file.dropped == 1


def test_newlines_and_broken_text_stay_one_line(opened, tmp_path: Path) -> None:
    file = opened(path=tmp_path / "w.log")
    file.put("a\nb \udcff")
    file.close()
    assert (tmp_path / "w.log").read_text() == "a\\nb \\udcff\n"


@pytest.fixture(autouse=True)
def _hear(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)


@pytest.mark.skipif(sys.platform == "win32", reason="a limit that only POSIX has")
def test_a_real_limit_of_the_kernel_is_survived_told_once_and_recovered_from(tmp_path: Path) -> None:
    """RLIMIT_FSIZE refuses bytes as a full disk does, in the middle of a batch; without luck it would also signal."""
    program = """
        import logging, resource, sys, time
        from pathlib import Path
        from supervisor.notices import close, set_up
        from supervisor.observe import logfile
        from supervisor.settings import LogTable
        logfile.LogFile.__init__.__kwdefaults__["retry_s"] = 0.01
        logfile.LogFile.close.__defaults__ = (40.0,)
        path = Path(sys.argv[1])
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        made = set_up(LogTable(file=str(path), max_mb=1, keep=1))
        log = logging.getLogger("supervisor.x")
        for number in range(500):
            log.info("line %d", number)
        until = time.monotonic() + 40
        while "cannot be written" not in "".join(e.message for e in made.ring.since(level="warning")):
            assert time.monotonic() < until
            time.sleep(0.005)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        log.info("line %d", 500)
        while made.file._lines:
            assert time.monotonic() < until
            time.sleep(0.005)
        close()
        print(made.file.dropped)
    """
    path = tmp_path / "w.log"
    argv = [sys.executable, "-c", textwrap.dedent(program), str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "0\n"
    assert done.stderr.count("cannot be written") == 1
    told = [json.loads(line)["message"] for line in path.read_text().splitlines()]
    assert [each for each in told if each.startswith("line ")] == [f"line {n}" for n in range(501)], "torn or lost"
