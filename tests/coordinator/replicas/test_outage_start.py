"""Silence of all is nobody's death: a database that was away, and a replica that starts just as it comes back.

Only the store's shifted clock makes anybody silent here, never a slow machine.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import anyio
import httpx
import pytest

psycopg = pytest.importorskip("psycopg", reason="psycopg is not installed (extra: postgres)")

from coordinator.attempts import Attempts  # noqa: E402
from coordinator.bus import LocalBus  # noqa: E402
from coordinator.records import Submission  # noqa: E402
from coordinator.replicas.opening import ReplicaTable, open_doorway  # noqa: E402
from coordinator.store.base import LEFT_BEHIND, Beat, OpenAttempt, Want  # noqa: E402
from coordinator.store.postgres import PostgresStore  # noqa: E402
from coordinator.store.postgres_link import away  # noqa: E402
from coordinator.store.threads import StoreThreads  # noqa: E402
from coordinator.testing import FakeWorker, OfferedJob, Running, running  # noqa: E402
from protocol import link_wire as wire  # noqa: E402
from protocol.faults import Fault  # noqa: E402
from tests.coordinator.replicas.rig import PATIENCE_S, SECRET, until  # noqa: E402

P = ParamSpec("P")
T = TypeVar("T")
SILENT_MS = 600_000
HOUR_MS = 3_600_000
CANCEL = Fault("cancelled", "The client left.")
OFFER = (wire.ModelOffer(name="m", kinds=("llm",), engine="fake", slots=2),)


class Stores(contextlib.ExitStack):
    """Coordinators over one database."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url

    def start(self) -> PostgresStore:
        """One more, as `Coordinator` starts it."""
        store = PostgresStore(self._url, silent_ms=SILENT_MS)
        self.callback(store.close)
        assert store.leave_unattended(CANCEL) == [], "whose clients they are it cannot know yet"
        return store


@pytest.fixture
def stores(apart: str) -> Iterator[Stores]:
    """Over an empty schema."""
    with Stores(apart) as opened:
        yield opened


def give_work(store: PostgresStore) -> None:
    """A job that runs and one that waits; clients of this coordinator hang on both."""
    for job in ("job_1", "job_2"):
        store.insert(job, Submission(kind="llm", model="m", params=b"\x80", attended=True))
    ((record, _),) = store.claim([Want("m", ("llm",), 1)])
    assert store.accept(record.id, record.attempt, "w1")


def states(store: PostgresStore) -> list[str]:
    found = [store.get(job) for job in ("job_1", "job_2")]
    return [record.state for record in found if record is not None]


def nobody_left(beat: Beat) -> bool:
    return (beat.taken, beat.left) == (0, ())


# ---- who starts --------------------------------------------------------------------------------------------


def test_who_starts_as_the_database_comes_back_judges_nobody_that_lives(stores: Stores) -> None:
    """All beats are old then, those of the living, too."""
    lives = stores.start()
    give_work(lives)
    lives.shift_clock(SILENT_MS + 1000)
    starts = stores.start()
    assert nobody_left(starts.beat())
    assert lives.beat().lapsed
    for _ in range(8):
        lives.shift_clock(SILENT_MS // 4)
        assert nobody_left(lives.beat())
        assert nobody_left(starts.beat())
    assert states(lives) == ["running", "queued"]
    assert [one.job for one in lives.open_attempts()] == ["job_1"]


def test_who_starts_takes_over_from_the_dead_in_time(stores: Stores) -> None:
    """Also when there is nobody else: from its own start on it waits no longer than for a beat of the living."""
    dead = stores.start()
    give_work(dead)
    dead.shift_clock(SILENT_MS + 1000)
    starts = stores.start()
    taken: list[int] = []
    for _ in range(4):
        beat = starts.beat()
        taken.append(beat.taken)
        starts.shift_clock(SILENT_MS // 4)
    assert taken == [0, 0, 0, 0]
    beat = starts.beat()
    assert (beat.lapsed, beat.taken) == (False, 1)
    assert sorted((left.id, left.state, left.fault) for left in beat.left) == [
        (job, "cancelled", LEFT_BEHIND) for job in ("job_1", "job_2")
    ]
    assert dead.beat().lapsed


# ---- who lived through it ----------------------------------------------------------------------------------


def test_whose_own_silence_was_just_short_enough_judges_nobody_for_it(stores: Stores) -> None:
    """The database was away for less than the silence that counts; one replica beat a little later before it than the
    other, and is first to reach it again."""
    slow, quick = stores.start(), stores.start()
    give_work(slow)
    slow.shift_clock(SILENT_MS // 5)
    assert nobody_left(quick.beat())
    slow.shift_clock(SILENT_MS * 9 // 10)
    beat = quick.beat()
    assert not beat.lapsed
    assert nobody_left(beat), "the other one is as late as this one, and no later"
    assert slow.beat().lapsed
    assert states(slow) == ["running", "queued"]


def test_who_was_away_so_long_that_it_was_forgotten_judges_nobody(stores: Stores) -> None:
    """A machine that slept for hours: its row is gone, and others have what it held."""
    slept, other = stores.start(), stores.start()
    slept.shift_clock(SILENT_MS + HOUR_MS)
    for _ in range(8):
        other.beat()
        other.shift_clock(SILENT_MS // 4)
    with slept._transaction():
        assert slept._one("SELECT id FROM gateways WHERE id = :me", me=slept.gateway) is None
    give_work(other)
    other.shift_clock(SILENT_MS)
    beat = slept.beat()
    assert beat.lapsed
    assert nobody_left(beat)


def test_a_client_that_came_after_the_silence_is_not_taken_for_gone(stores: Stores) -> None:
    """A replica that was stopped takes requests before its next beat."""
    stopped, other = stores.start(), stores.start()
    stopped.insert("job_0", Submission(kind="llm", model="o", params=b"\x80", attended=True))
    stopped.shift_clock(SILENT_MS)
    other._appear()  # it was not stopped
    give_work(stopped)
    assert [left.id for left in other.beat().left] == ["job_0"]
    assert states(other) == ["running", "queued"]
    assert stopped.beat().lapsed
    assert nobody_left(other.beat())


# ---- workers that cannot come back meanwhile ---------------------------------------------------------------


class Direct(StoreThreads):
    """No threads: the clock of these tests is a virtual one."""

    async def read(self, function: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        return function(*args, **named)


class Rows:
    """A store with one open attempt, and nothing else."""

    parallel = 1

    def open_attempts(self) -> list[OpenAttempt]:
        return [OpenAttempt("job_1", 1, "running", "w1", "llm", "m")]

    accept_many = complete_many = None


async def test_the_grace_of_a_worker_begins_anew_when_the_store_was_away(autojump_clock: object) -> None:
    lost: list[str] = []
    none: Any = None
    rows: Any = Rows()
    attempts = Attempts(rows, Direct(), none, LocalBus(), ring=lambda _: None, freed=lambda: None)

    async def lose(row: OpenAttempt) -> None:
        lost.append(row.job)

    attempts.lose = lose  # type: ignore[method-assign]
    await attempts.reconcile(4.0)
    await anyio.sleep(20)  # no look reaches the store
    for _ in range(3):
        await attempts.reconcile(4.0)
        assert lost == []
        await anyio.sleep(1)
    await anyio.sleep(1)
    await attempts.reconcile(4.0)
    assert lost == ["job_1"], "it did not come back, though it could"


# ---- whole replicas ----------------------------------------------------------------------------------------


class Cut(PostgresStore):
    """A store that reaches its database for all but its beats, when told so; and counts those that arrive."""

    def __init__(self, url: str) -> None:
        self.cut, self.beats = False, 0
        super().__init__(url, silent_ms=SILENT_MS)

    def beat(self) -> Beat:
        """As of any store."""
        if self.cut:
            raise away()
        beat = super().beat()
        self.beats += 1
        return beat


def test_a_stream_without_a_key_outlives_an_outage_and_a_start(apart: str, tmp_path: Path) -> None:
    """Its client hangs on a replica that lives all the time, and that is last to say so again."""
    secret = tmp_path / "secret"
    secret.write_text(SECRET + "\n")
    opened: list[Cut] = []
    words, goes_on = [f"w{n} " for n in range(6)], threading.Event()

    def script(job: OfferedJob) -> None:
        job.started()
        for word in words[:3]:
            job.chunk({"delta": {"content": word}})
        if not goes_on.wait(PATIENCE_S) or job.cancelled.is_set():
            return
        for word in words[3:]:
            job.chunk({"delta": {"content": word}})
        job.complete({"content": "".join(words)})

    def one() -> Cut:
        opened.append(Cut(apart))
        return opened[-1]

    with contextlib.ExitStack() as stack:

        def replica() -> Running:
            doorway = open_doorway(ReplicaTable(listen="127.0.0.1:0", secret_file=str(secret)))
            return stack.enter_context(running(tmp_path / "state", open_store=one, doorway=doorway))

        lives = replica()
        stack.enter_context(FakeWorker(lives, OFFER, script, "w1"))
        body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "x"}]}
        stream = httpx.stream(
            "POST", f"{lives.url}/v1/chat/completions", headers=lives.headers, json=body, timeout=PATIENCE_S
        )
        lines = stack.enter_context(stream).iter_lines()
        assert any("w2 " in line for line in lines), "the first half has come"
        opened[0].cut = True
        opened[0].shift_clock(SILENT_MS + 1000)
        replica()
        until(lambda: opened[1].beats >= 2)
        before, opened[0].cut = opened[0].beats, False
        until(lambda: opened[0].beats > before + 1)
        goes_on.set()
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert all(any(word in line for line in rest) for word in words[3:])
