"""The store: durable when it says so, whatever happens to the process, the disk or the power."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import trio

from supervisor import store as stores
from supervisor.errors import SupervisorError
from supervisor.store import Connection, StoreProblem, open_store


def put(job: str, attempt: int = 1, size: int = 10):
    def change(connection: Connection) -> None:
        connection.execute(
            "INSERT INTO claims (job, attempt, offer, taken_ms) VALUES (?, ?, ?, 0)", (job, attempt, b"x" * size)
        )

    return change


def jobs(connection: Connection) -> set[str]:
    return {job for (job,) in connection.execute("SELECT job FROM claims")}


async def test_what_was_written_is_there_next_time(tmp_path):
    path = tmp_path / "deep" / "worker.db"
    async with open_store(path) as store:
        await store.write(put("a"))
        assert await store.write(jobs) == {"a"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    async with open_store(path) as store:
        assert await store.write(jobs) == {"a"}


async def test_writes_at_the_same_time_share_a_transaction(tmp_path):
    from tests.supervisor.power import Disk

    disk = Disk(1)
    async with open_store(tmp_path / "db", disk.connect) as store:
        before = disk.syncs
        async with trio.open_nursery() as nursery:
            for number in range(200):
                nursery.start_soon(store.write, put(f"j{number}"))
        assert len(await store.write(jobs)) == 200
        assert disk.syncs - before <= 8


async def test_one_bad_write_fails_alone(tmp_path):
    errors = []

    async def bad(store) -> None:
        try:
            await store.write(put("a"))
        except StoreProblem as problem:
            errors.append(problem)

    async with open_store(tmp_path / "db") as store:
        await store.write(put("a"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bad, store)
            nursery.start_soon(store.write, put("b"))
            nursery.start_soon(store.write, put("c"))
        assert await store.write(jobs) == {"a", "b", "c"}
    assert len(errors) == 1
    assert not errors[0].full


async def test_what_was_queued_is_written_although_everything_is_cancelled(tmp_path):
    with trio.CancelScope() as scope:
        async with open_store(tmp_path / "db") as store:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store.write, put("a"))
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
    async with open_store(tmp_path / "db") as store:
        assert await store.write(jobs) == {"a"}


async def test_a_newer_file_is_refused_with_the_cure(tmp_path):
    path = tmp_path / "db"
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(SupervisorError, match="install the newer one"):
        async with open_store(path):
            pass


async def test_a_file_that_is_no_database_is_refused(tmp_path):
    path = tmp_path / "db"
    path.write_bytes(b"nonsense " * 500)
    with pytest.raises(SupervisorError, match="cannot be opened"):
        async with open_store(path):
            pass


async def test_every_schema_version_is_brought_up_to_date(tmp_path, monkeypatch):
    path = tmp_path / "db"
    async with open_store(path) as store:
        await store.write(put("a"))
    monkeypatch.setattr(stores, "MIGRATIONS", (*stores.MIGRATIONS, ("ALTER TABLE claims ADD COLUMN extra TEXT",)))
    async with open_store(path) as store:
        assert await store.write(jobs) == {"a"}
        assert await store.write(lambda c: list(c.execute("SELECT extra FROM claims"))) == [(None,)]


@pytest.mark.parametrize("seed", range(12))
async def test_a_power_cut_takes_nothing_that_was_acknowledged_and_leaves_nothing_half(tmp_path, seed):
    from tests.supervisor.power import Disk

    dice, disk, path = random.Random(seed), Disk(seed), tmp_path / "db"
    known: set[str] = set()
    for life in range(4):
        asked: set[str] = set()
        store_cut = disk.writes + dice.randint(5, 60)
        async with open_store(path, disk.connect) as store:
            there = await store.write(jobs)
            assert known <= there
            known = set(there)
            for number in range(40):
                job = f"{life}.{number}"
                asked.add(job)
                await store.write(put(job, size=dice.choice((10, 700, 6000))))
                known.add(job)
                if disk.writes >= store_cut:
                    break
            held = await store.write(lambda c: (list(c.execute("PRAGMA integrity_check")), None))
            assert held[0] == [("ok",)]
            disk.off = True
        disk.cut()


@pytest.mark.parametrize("room", [9_000, 30_000, 60_000, 100_000])
async def test_a_full_disk_loses_nothing_and_is_told(tmp_path, room):
    from tests.supervisor.power import Disk

    disk, path = Disk(room), tmp_path / "db"
    known: set[str] = set()
    async with open_store(path, disk.connect) as store:
        disk.room = room
        problems = 0
        for number in range(60):
            try:
                await store.write(put(f"j{number}", size=3000))
                known.add(f"j{number}")
            except StoreProblem as problem:
                problems += problem.full and "full" in store.problem
        assert problems == 60 - len(known) > 0
        assert await store.write(jobs) == known
        disk.room = None
        await store.write(put("after"))
        assert store.problem == ""
    disk.cut()
    async with open_store(path, disk.connect) as store:
        assert await store.write(jobs) == known | {"after"}


KILLED = """
import sys, trio
from pathlib import Path
from supervisor.store import open_store
from tests.supervisor.test_store import put

async def main():
    async with open_store(Path(sys.argv[1])) as store:
        for number in range(100_000):
            await store.write(put(f"j{number}"))
            print(number, flush=True)

trio.run(main)
"""


@pytest.mark.parametrize("after", [1, 7, 40])
def test_a_kill_takes_nothing_that_was_acknowledged(tmp_path: Path, after: int):
    path = tmp_path / "db"
    root = Path(__file__).parents[2]
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env=dict(os.environ, PYTHONPATH=str(root)),
    )
    assert child.stdout is not None
    last = 0
    for line in child.stdout:
        last = int(line)
        if last >= after:
            break
    child.send_signal(signal.SIGKILL)
    rest = child.stdout.read().split()
    child.wait()
    child.stdout.close()
    last = int(rest[-1]) if rest else last
    connection = sqlite3.connect(path)
    found = jobs(connection)
    connection.close()
    assert {f"j{number}" for number in range(last + 1)} <= found
