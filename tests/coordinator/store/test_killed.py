"""kill -9 of a coordinator over SQLite: whatever a client was told is stored is there afterwards.

BULKHEAD_KILLS=200 kills so often instead of the few of the suite; BULKHEAD_KILL_FIRST is the first seed. A seed says
after how many answers the blow comes, and how much later.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from coordinator.store import SqliteStore, StoreBusy
from coordinator.store.opening import STORE_FILE

KILLS, FIRST = int(os.environ.get("BULKHEAD_KILLS", "20")), int(os.environ.get("BULKHEAD_KILL_FIRST", "0"))
CLIENTS = 4
MOST_ANSWERS = 40
PER_FOLDER = 20  # the same file is killed and opened again so often
WAIT_S = 60.0
JOB = {"kind": "command", "model": "m", "wait_for_worker": True}


class Forks:
    """Coordinators, one after another."""

    def __init__(self, program: subprocess.Popen[str]) -> None:
        self._program = program

    def start(self, state: Path) -> tuple[int, str]:
        """Process id and URL of a coordinator that serves."""
        assert self._program.stdin
        self._program.stdin.write(f"{state}\n")
        self._program.stdin.flush()
        words = [self._line(), self._line()]  # either may come first
        pid, url = sorted(words, key=lambda line: not line.startswith("pid "))
        assert url.startswith("Serving "), words
        return int(pid.split()[1]), url.split()[1]

    def _line(self) -> str:
        assert self._program.stdout
        return self._program.stdout.readline()


@pytest.fixture
def forks() -> Iterator[Forks]:
    program = subprocess.Popen(
        [sys.executable, "-m", "tests.coordinator.store.forking_server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).parents[3],
        start_new_session=True,
    )
    try:
        yield Forks(program)
    finally:
        assert program.stdin
        assert program.stdout
        os.killpg(program.pid, signal.SIGKILL)
        program.wait(WAIT_S)
        program.stdin.close()
        program.stdout.close()


class Clients:
    """Threads that submit jobs, one by one and many at once, until nobody answers any more."""

    def __init__(self, url: str, key: str, dice: random.Random) -> None:
        self.told: list[str] = []  # ids whose answer was read to its end
        self.wanted = dice.randint(1, MOST_ANSWERS)
        self.enough = threading.Event()
        self._url, self._headers = url, {"authorization": f"Bearer {key}"}
        self._threads = [threading.Thread(target=self._submit, args=(dice.random(),)) for _ in range(CLIENTS)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.join(WAIT_S)
            assert not thread.is_alive()

    def _submit(self, seed: float) -> None:
        dice = random.Random(seed)
        with contextlib.suppress(httpx.HTTPError), httpx.Client(headers=self._headers, timeout=WAIT_S) as http:
            while True:
                if dice.random() < 0.2:
                    answer = http.post(f"{self._url}/jobs/batch", json={"jobs": [JOB] * dice.randint(1, 8)})
                    assert answer.status_code == 200, answer.text
                    self._tell(*(line["id"] for line in answer.json()["jobs"]))
                else:
                    answer = http.post(f"{self._url}/jobs", json=JOB)
                    assert answer.status_code == 202, answer.text
                    self._tell(answer.json()["id"])

    def _tell(self, *jobs: str) -> None:
        self.told.extend(jobs)
        if len(self.told) >= self.wanted:
            self.enough.set()


def test_what_a_client_was_told_outlives_a_kill(forks: Forks, tmp_path: Path) -> None:
    told: set[str] = set()
    for seed in range(FIRST, FIRST + KILLS):
        dice = random.Random(seed)
        state = tmp_path / str((seed - FIRST) // PER_FOLDER)
        if not state.is_dir():
            told.clear()
        pid, url = forks.start(state)
        try:
            with Clients(url, (state / "client.key").read_text().strip(), dice) as clients:
                assert clients.enough.wait(WAIT_S), f"seed {seed}: nobody was answered"
                time.sleep(dice.random() * 0.004)  # somewhere in a transaction, or between two
                os.kill(pid, signal.SIGKILL)
                pid = 0
        finally:
            if pid:
                os.kill(pid, signal.SIGKILL)
        told |= set(clients.told)
        missing = told - held(state / STORE_FILE)
        assert not missing, f"seed {seed}: {len(missing)} of {len(told)} jobs are lost"
        sys.stdout.write(f"seed {seed}: {len(clients.told)} answers, {len(told)} in all, none lost\n")


def held(path: Path) -> set[str]:
    """The ids in the store, as the next coordinator finds them; the file is whole."""
    store = open_again(path)
    try:
        with contextlib.closing(sqlite3.connect(path)) as connection:
            assert connection.execute("PRAGMA quick_check").fetchone() == ("ok",)
            return {name for (name,) in connection.execute("SELECT id FROM jobs")}
    finally:
        store.close()


def open_again(path: Path) -> SqliteStore:
    """Once the killed one's lock is gone; the kernel lets go of it when the process is buried."""
    end = time.monotonic() + WAIT_S
    while True:
        try:
            return SqliteStore(path)
        except StoreBusy:
            assert time.monotonic() < end
            time.sleep(0.005)
