"""What is PostgreSQL's own: many coordinators, connections that break, the schema, a database that is away."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from coordinator.deploy.plan import plan
from coordinator.deploy.spec import Asked
from coordinator.records import StoredInput, Submission
from coordinator.store import StoreError, StoreTooNew
from coordinator.store.base import LEFT_BEHIND, Outcome, StoreAway, Want
from coordinator.store.shelf import BatchItem, BatchRecord, FileRecord
from protocol.faults import Fault, FaultError
from protocol.link_wire import Capabilities

psycopg = pytest.importorskip("psycopg", reason="psycopg is not installed (extra: postgres)")

from psycopg.conninfo import conninfo_to_dict, make_conninfo  # noqa: E402

from coordinator.store import postgres, postgres_link  # noqa: E402
from coordinator.store.postgres import PostgresStore  # noqa: E402
from coordinator.testing_postgres import postgres_server, why_not  # noqa: E402

if TYPE_CHECKING:
    from coordinator.testing_postgres import PostgresServer

CRASH = Fault("engine_crashed", "The engine crashed.")
CANCEL = Fault("cancelled", "The client left.")
ANY = Want("chat", ("llm",), 100)
WAIT_S = 60.0
SILENT_MS = 600_000  # of the stores of these tests: only the shifted clock makes one silent, never a slow machine
Open = Callable[..., PostgresStore]


@pytest.fixture
def open_store(space: str) -> Iterator[Open]:
    """Another coordinator over the same database, with every call."""
    with contextlib.ExitStack() as stack:

        def one(**options: Any) -> PostgresStore:
            store = PostgresStore(space, **{"silent_ms": SILENT_MS, **options})
            stack.callback(store.close)
            return store

        yield one


def submission(**options: Any) -> Submission:
    return Submission(**{"kind": "llm", "model": "chat", "params": b"\x80", **options})


def running(store: PostgresStore, job: str, **options: Any) -> None:
    store.insert(job, submission(**options))
    assert [record.id for record, _ in store.claim([ANY])] == [job]
    assert store.accept(job, 1, "w1")


# ---- many coordinators -------------------------------------------------------------------------------------


def test_each_sees_what_it_holds_and_takes_over_from_the_silent(open_store: Open) -> None:
    first, second = open_store(), open_store()
    running(first, "job_1")
    assert [one.job for one in first.open_attempts()] == ["job_1"]
    assert second.open_attempts() == []
    assert second.beat().taken == 0
    first.shift_clock(SILENT_MS)
    second._appear()  # the clock went on for both, and only one of them was silent
    beat = second.beat()
    assert (beat.lapsed, beat.taken) == (False, 1)
    assert first.open_attempts() == []
    assert [(one.job, one.state) for one in second.open_attempts()] == [("job_1", "running")]
    assert first.beat().lapsed
    # What it still has it may end: the attempt is the fence, not who holds it.
    assert first.complete("job_1", 1, "w1", Outcome(b"\x80")).verdict == "stored"
    assert second.fail("job_1", 1, "w1", CRASH).verdict == "fenced"


def test_after_a_silence_of_all_nobody_is_taken_over(open_store: Open) -> None:
    """The database was away: whoever comes back first must not believe that the others are gone."""
    first, second = open_store(), open_store()
    running(first, "job_1")
    first.insert("job_2", submission(attended=True))
    first.shift_clock(SILENT_MS)
    for _ in range(2):
        beat = second.beat()
        assert (beat.taken, beat.left) == (0, ())
    for _ in range(4):  # the other one stays away
        first.shift_clock(SILENT_MS // 4)
        beat = second.beat()
    assert beat.taken == 1
    row = second.get("job_2")
    assert row is not None
    assert row.state == "cancelled"


def test_a_clock_that_goes_back_keeps_nobody_alive(open_store: Open) -> None:
    """The database's own was wrong, or another server took over whose clock is behind."""
    first, second = open_store(), open_store()
    first.shift_clock(10 * SILENT_MS)
    assert second.beat().lapsed
    first.beat()
    running(first, "job_1")
    first.shift_clock(-10 * SILENT_MS)
    for _ in range(2):
        assert second.beat().taken == 0, "it may live: it had no time to beat"
    assert first.peers() == second.peers() == []
    first.shift_clock(SILENT_MS + 1)
    second._appear()
    assert second.beat().taken == 1


def test_a_worker_that_went_with_its_coordinator_is_forgotten(open_store: Open) -> None:
    first, second = open_store(), open_store()
    first.deploy("chat", lambda _known: Asked(name="chat", source="https://models.test/a.gguf", replicas=1))
    second.seen("w1", Capabilities(), draining=False)
    first.shift_clock(SILENT_MS + 3_600_000)
    first._appear()
    assert not first.candidates()["w1"].connected
    assert not first.standing(plan).settled
    first.replan(plan)
    assert first.candidates() == {}
    assert first.standing(plan).settled, "a look that finds nothing to do only reads"


def test_replicas_find_each_other_by_their_beats(open_store: Open) -> None:
    first, second, third = open_store(), open_store(), open_store()
    second.advertised, third.advertised = "ws://second:9090", "ws://third:9090"
    assert first.peers() == []
    for store in (second, third):
        store.beat()
    assert first.peers() == sorted([(second.gateway, "ws://second:9090"), (third.gateway, "ws://third:9090")])
    assert [name for name, _ in second.peers()] == [third.gateway]
    first.shift_clock(SILENT_MS)
    third.beat()
    assert [name for name, _ in first.peers()] == [third.gateway]


def test_what_ended_is_told_of_many_jobs_at_once(open_store: Open) -> None:
    store = open_store()
    running(store, "job_1")
    store.insert("job_2", submission())
    store.complete("job_1", 1, "w1", Outcome(b"\x80"))
    assert sorted(store.ended_of(["job_1", "job_2", "job_gone"])) == ["job_1", "job_gone"]
    assert store.ended_of([]) == []


def test_a_beat_says_whether_it_comes_too_late(open_store: Open) -> None:
    store = open_store()
    assert not store.beat().lapsed
    store.shift_clock(SILENT_MS)
    assert store.beat().lapsed
    assert not store.beat().lapsed


def test_every_break_of_the_beats_is_told(open_store: Open, caplog: pytest.LogCaptureFixture) -> None:
    store = open_store()
    assert not store.beat().lapsed
    assert "No beat" not in caplog.text
    store.shift_clock(SILENT_MS // 2 + 1000)
    assert not store.beat().lapsed
    assert re.search(r"No beat reached the database for 3\d\d\.\d s", caplog.text)
    assert "taken over" not in caplog.text
    store.shift_clock(SILENT_MS)
    assert store.beat().lapsed
    assert "others may have taken over" in caplog.text


def test_a_worker_that_comes_to_another_coordinator_is_held_there(open_store: Open) -> None:
    first, second = open_store(), open_store()
    running(first, "job_1")
    assert second.adopt("job_1", 1, "w1").verdict == "adopted"
    assert first.open_attempts() == []
    assert [one.job for one in second.open_attempts()] == ["job_1"]
    assert second.adopt("job_1", 1, "w2").verdict == "fenced"


def test_jobs_whose_clients_hung_on_a_silent_coordinator_are_cancelled(open_store: Open) -> None:
    first, second = open_store(), open_store()
    first.insert("job_1", submission(attended=True))
    first.insert("job_2", submission())
    second.insert("job_3", submission(attended=True))
    assert second.beat().left == ()
    first.shift_clock(SILENT_MS)
    second._appear()
    (left,) = second.beat().left
    assert (left.id, left.state, left.fault) == ("job_1", "cancelled", LEFT_BEHIND)
    assert [second.has_job(name) and second.get(name).state for name in ("job_2", "job_3")] == ["queued", "queued"]  # type: ignore[union-attr]


def test_the_same_model_wanted_twice_is_claimed_as_if_one_after_the_other(open_store: Open) -> None:
    store = open_store()
    for n in range(4):
        store.insert(f"job_{n}", submission(kind="llm" if n % 2 else "embedding"))
    wants = [Want("chat", ("llm",), 1), Want("chat", ("llm", "embedding"), 1), Want("other", ("llm",), 5)]
    assert len(store.claim(wants)) == 2


def test_claims_of_others_are_not_waited_for(open_store: Open, space: str) -> None:
    store = open_store()
    for n in range(3):
        store.insert(f"job_{n}", submission())
    with psycopg.connect(space) as other:
        other.execute("SELECT id FROM jobs WHERE id = 'job_0' FOR UPDATE")
        assert [record.id for record, _ in store.claim([ANY])] == ["job_1", "job_2"]
    assert [record.id for record, _ in store.claim([ANY])] == ["job_0"]


def test_a_claim_walks_the_index_and_sorts_nothing(open_store: Open, space: str) -> None:
    store = open_store()
    fill = (
        "INSERT INTO jobs (id, tenant, key_id, idempotency_key, fingerprint, kind, model, max_attempts, priority, "
        "deadline_at_ms, created_ms, stream, vram_gb_estimate, traceparent, labels, params, inputs, vt, state) "
        "SELECT 'job_' || n, 't', '', '', '', 'llm', 'm' || n % 10, 3, n % 3, 0, 0, 0, 0, '', '\\x80', '', '\\x90', n, "
        "CASE WHEN n % 2 = 0 THEN 'queued' ELSE 'succeeded' END FROM generate_series(1, 20000) AS n"
    )
    from coordinator.store.postgres import _CLAIM

    with psycopg.connect(space, autocommit=True) as connection:
        connection.execute(fill)
        connection.execute("ANALYZE jobs")
        asked = {"models": ["m2", "m4"], "needs": ["", ""], "kinds": ["llm", "llm"], "limits": [20, 20]}
        names = {**asked, "vrams": [8.0, 1e9], "buts": ["", "job_2"], "waits": [0, 250], "me": "x", "now": 1}
        explain = f"EXPLAIN {postgres_link.translated(_CLAIM)}"
        plan = "\n".join(row[0] for row in connection.execute(explain, names))
    assert "using jobs_waiting" in plan
    walk = plan[plan.index("Limit") :]  # what is above it sorts the few that were picked
    assert "Sort" not in walk
    assert "Seq Scan on jobs" not in plan
    assert len(store.claim([Want("m2", ("llm",), 20), Want("m4", ("llm",), 20)])) == 40


# ---- the doorbell ------------------------------------------------------------------------------------------


def test_work_that_one_makes_rings_at_the_others(open_store: Open) -> None:
    first, second = open_store(), open_store()
    heard, own = threading.Event(), threading.Event()
    second.listen(heard.set)
    first.listen(own.set)
    for store in (first, second):
        assert store._bell is not None
        assert store._bell.heard.wait(WAIT_S)
    for event in (heard, own):
        assert event.wait(WAIT_S)  # once after connecting: what was rung for before is not known
        event.clear()
    for n in range(20):
        first.insert(f"job_{n}", submission())
    assert heard.wait(WAIT_S)
    # A ring of the second is heard by the first, after its own, which it therefore has passed over.
    assert not own.is_set()
    second.insert("job_x", submission())
    assert own.wait(WAIT_S)


def test_a_broken_doorbell_is_mended(open_store: Open, space: str) -> None:
    first, second = open_store(), open_store()
    rings: list[int] = []
    heard = threading.Condition()

    def ring() -> None:
        with heard:
            rings.append(1)
            heard.notify_all()

    second.listen(ring)
    with heard:
        assert heard.wait_for(lambda: len(rings) >= 1, WAIT_S)
    with psycopg.connect(space, autocommit=True) as admin:
        admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN %'")
    with heard:
        assert heard.wait_for(lambda: len(rings) >= 2, WAIT_S)
        rung = len(rings)
    first.listen(lambda: None)
    first.insert("job_1", submission())
    with heard:
        assert heard.wait_for(lambda: len(rings) > rung, WAIT_S)


def test_behind_a_pooler_nothing_is_prepared_set_or_listened_to(open_store: Open, space: str) -> None:
    store = open_store(pooled=True, connections=2)
    store.listen(lambda: None)
    assert store._bell is None
    for n in range(8):
        running(store, f"job_{n}")
        assert store.get(f"job_{n}") is not None
    connection = store._link._pool.getconn()
    try:
        assert connection.execute("SELECT count(*) AS n FROM pg_prepared_statements").fetchone() == {"n": 0}
        assert connection.execute("SHOW statement_timeout").fetchone() == {"statement_timeout": "0"}
        with store._link.transaction():
            assert store._all("SHOW statement_timeout")[0]["statement_timeout"] == "15s"
    finally:
        store._link._pool.putconn(connection)


# ---- connections that break --------------------------------------------------------------------------------

FILE = FileRecord(id="file-1", tenant="default", name="a", purpose="batch", blob="b1", size=1, sha256="0" * 64)
BATCH = BatchRecord(id="batch_1", tenant="default", endpoint="/v1/x", input_file="file-1")
INPUT = (StoredInput("audio", "blob_x", 5, "f" * 64),)


def _nothing(_: PostgresStore) -> None: ...


def _queued(store: PostgresStore) -> None:
    store.insert("job_1", submission(inputs=INPUT))


def _offered(store: PostgresStore) -> None:
    _queued(store)
    store.claim([ANY])


def _running(store: PostgresStore) -> None:
    _offered(store)
    store.accept("job_1", 1, "w1")


def _cancelled(store: PostgresStore) -> None:
    _running(store)
    store.cancel("job_1", "default", CANCEL)


def _late(store: PostgresStore) -> None:
    store.expire(0)  # the first look of a store does more
    store.insert("job_1", submission(deadline_ms=1000))
    store.shift_clock(2000)


def _filed(store: PostgresStore) -> None:
    store.add_file(FILE)


def _batched(store: PostgresStore) -> None:
    _filed(store)
    store.add_batch(BATCH, 1000)


def _gone(store: PostgresStore) -> None:
    _running(store)
    store.shift_clock(SILENT_MS)
    store._appear()  # for so long it has been here itself, so it may judge
    with store._transaction():
        store._all("UPDATE jobs SET gateway = 'gone', origin = 'gone', attended = 1 RETURNING id")


# name -> (what comes before, the step, what it must return)
STEPS: dict[str, tuple[Callable[[PostgresStore], None], Callable[[PostgresStore], Any], Any]] = {
    "insert": (_nothing, lambda s: s.insert("job_1", submission(inputs=INPUT))[1], True),
    "insert again": (
        lambda s: s.insert("job_1", submission(idempotency_key="k")),
        lambda s: s.insert("job_2", submission(idempotency_key="k"))[1],
        False,
    ),
    "insert and claim": (_nothing, lambda s: len(s.insert_and_claim("job_1", submission(), [ANY])[2]), 1),
    "claim": (_queued, lambda s: [record.attempt for record, _ in s.claim([ANY])], [1]),
    "release": (_offered, lambda s: s.release("job_1", 1), True),
    "accept": (_offered, lambda s: s.accept("job_1", 1, "w1"), True),
    "mark streamed": (_running, lambda s: s.mark_streamed("job_1", 1, "w1"), True),
    "adopt": (_offered, lambda s: s.adopt("job_1", 1, "w1").verdict, "adopted"),
    "adopt fenced": (_running, lambda s: s.adopt("job_1", 1, "w2").verdict, "fenced"),
    "complete": (
        _running,
        lambda s: s.complete("job_1", 1, "w1", Outcome(b"r", (), {"images": 1.0})).verdict,
        "stored",
    ),
    "complete late": (_cancelled, lambda s: s.complete("job_1", 1, "w1", Outcome(b"", (), {"n": 1.0})).verdict, "late"),
    "fail": (_running, lambda s: s.fail("job_1", 1, "w1", CRASH).requeued, True),
    "fail for good": (_running, lambda s: s.fail("job_1", 1, "w1", CANCEL).verdict, "stored"),
    "end": (_offered, lambda s: s.end("job_1", 1, CRASH).verdict, "stored"),
    "cancel": (_running, lambda s: s.cancel("job_1", "default", CANCEL).won, True),
    "expire": (_late, lambda s: len(s.expire(0)), 1),
    "purge": (_cancelled, lambda s: [job.blobs for job in s.purge(-1000)], [("blob_x",)]),
    "remove": (_cancelled, lambda s: s.remove("job_1", "default").blobs, ("blob_x",)),
    "beat": (_gone, lambda s: (s.beat().taken, s.get("job_1").state), (1, "cancelled")),
    "add file": (_nothing, lambda s: s.add_file(FILE).id, "file-1"),
    "remove file": (_filed, lambda s: s.remove_file("file-1", "default").id, "file-1"),
    "add batch": (_filed, lambda s: s.add_batch(BATCH, 1000).version, 1),
    "save batch": (_batched, lambda s: s.save_batch(msgspec.structs.replace(BATCH, version=1)).version, 2),
    "note items": (_batched, lambda s: s.note_items("batch_1", [BatchItem(0, "job_1"), BatchItem(1)]), None),
    "read": (_queued, lambda s: s.get("job_1").id, "job_1"),
}
_COUNTED = ("jobs", "input_blobs", "files", "batches", "batch_items")
_VARY = {
    "created_ms",
    "started_ms",
    "finished_ms",
    "deadline_at_ms",
    "run_after_ms",
    "gateway",
    "origin",
    "body",
    "seq",
}


def contents(url: str) -> dict[str, Any]:
    """All rows, without what differs between two runs."""
    from psycopg.rows import dict_row

    with psycopg.connect(url, row_factory=dict_row) as connection:
        return {
            table: [
                {name: value for name, value in row.items() if name not in _VARY}
                for row in connection.execute(f"SELECT * FROM {table} ORDER BY 1")
            ]
            for table in _COUNTED
        }


class Breaker:
    """Ends the backend of the connection at the chosen step of a transaction: before a statement, or about COMMIT."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
        self.armed: int | str | None = None
        self.seen, self.broke = 0, False
        self._url, self._run, self._commit = url, postgres_link._run, postgres_link._commit
        monkeypatch.setattr(postgres_link, "_run", self.run)
        monkeypatch.setattr(postgres_link, "_commit", self.commit)

    def kill(self, connection: Any) -> None:
        self.armed, self.broke = None, True
        with psycopg.connect(self._url, autocommit=True) as admin:
            admin.execute("SELECT pg_terminate_backend(%s)", (connection.info.backend_pid,))
            still = "SELECT 1 FROM pg_stat_activity WHERE pid = %s"
            while admin.execute(still, (connection.info.backend_pid,)).fetchone():
                pass

    def run(self, connection: Any, statement: str, names: dict[str, Any]) -> Any:
        if self.armed == self.seen:
            self.kill(connection)
        self.seen += 1
        return self._run(connection, statement, names)

    def commit(self, connection: Any) -> Any:
        if self.armed == "before commit":
            self.kill(connection)
        if self.armed != "after commit":
            return self._commit(connection)
        assert self._commit(connection) is None
        self.kill(connection)  # committed, and the answer did not come through
        with pytest.raises(psycopg.Error) as lost:
            connection.execute("SELECT 1")
        return lost.value


def emptied(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute(f"TRUNCATE {', '.join(_COUNTED)} CASCADE")
        admin.execute("UPDATE clock SET shift_ms = 0")


@pytest.mark.parametrize("name", STEPS)
def test_a_connection_that_is_cut_anywhere_leaves_nothing_half_done(
    name: str, open_store: Open, space: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut before each statement in turn, before COMMIT and behind it: the same answer and the same rows as uncut."""
    prepare, step, expected = STEPS[name]
    store, breaker = open_store(), Breaker(monkeypatch, space)
    prepare(store)
    breaker.seen = 0
    assert step(store) == expected
    statements, wanted = breaker.seen, contents(space)
    for point in (*range(statements), *(() if name == "read" else ("before commit", "after commit"))):
        emptied(space)
        prepare(store)
        breaker.armed, breaker.seen, breaker.broke = point, 0, False
        assert step(store) == expected, point
        assert breaker.broke, point
        assert contents(space) == wanted, point


def test_connections_that_were_all_cut_are_replaced_unseen(open_store: Open, space: str) -> None:
    store = open_store()
    threads = [threading.Thread(target=store.insert, args=(f"job_{n}", submission())) for n in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    with psycopg.connect(space, autocommit=True) as admin:
        admin.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = 'bulkhead'"
        )
    assert store.insert("job_last", submission())[1]
    assert len(store.claim([ANY])) == 31


# ---- a database that is away -------------------------------------------------------------------------------


@pytest.fixture
def own_server() -> Iterator[PostgresServer]:
    if reason := why_not():
        pytest.skip(reason)
    with postgres_server() as server:
        yield server


def test_while_the_database_is_away_clients_are_told_to_come_back(
    own_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(PostgresStore(own_server.url)) as store:
        running(store, "job_1")
        monkeypatch.setattr(postgres_link, "PATIENCE_S", 0.2)
        monkeypatch.setattr(store._link._pool, "timeout", 0.2)
        own_server.stop()
        for step in (
            lambda: store.get("job_1"),
            lambda: store.complete("job_1", 1, "w1", Outcome(b"\x80")),
            lambda: store.insert("job_2", submission()),
        ):
            with pytest.raises(StoreAway) as caught:
                step()
            fault = caught.value.fault
            assert (fault.code, fault.http_status, fault.may_retry) == ("overloaded", 503, True)
            assert "Nothing was changed" in fault.message
        own_server.start()
        monkeypatch.setattr(postgres_link, "PATIENCE_S", WAIT_S)
        monkeypatch.setattr(store._link._pool, "timeout", WAIT_S)
        assert until_it_answers(lambda: store.complete("job_1", 1, "w1", Outcome(b"\x80"))).verdict == "stored"
        assert not store.has_job("job_2")


def until_it_answers(step: Callable[[], Any]) -> Any:
    for _ in range(200):
        with contextlib.suppress(StoreAway):
            return step()
    raise AssertionError("the store did not recover")


def test_a_commit_whose_server_was_replaced_is_in_doubt_and_says_so(
    open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    monkeypatch.setattr(postgres_link, "_commit", lambda connection: psycopg.OperationalError("lost"))
    began = store._link._began

    def elsewhere(connection: Any, synced: bool) -> Any:
        return began(connection, synced)._replace(born="another life")

    monkeypatch.setattr(store._link, "_began", elsewhere)
    with pytest.raises(StoreAway, match="not known"):
        store.insert("job_1", submission())


# ---- what is refused ---------------------------------------------------------------------------------------


def test_a_text_that_cannot_be_stored_is_the_callers_fault(open_store: Open) -> None:
    store = open_store()
    for step in (lambda: store.insert("job_1", submission(model="a\0b")), lambda: store.get("job_\0")):
        with pytest.raises(FaultError, match="NUL") as caught:
            step()
        assert caught.value.fault.http_status == 400
    assert store.insert("job_1", submission())[1]


def test_a_schema_of_a_later_version_is_left_alone(open_store: Open, space: str) -> None:
    open_store().close()
    with psycopg.connect(space, autocommit=True) as admin:
        admin.execute("INSERT INTO schema_version VALUES (99)")
    with pytest.raises(StoreTooNew, match="later version"):
        open_store()


def test_a_step_of_the_schema_may_take_long(
    space: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It may write every row of a large table, and wait for whoever reads them."""
    patient = """
        DO $$ BEGIN
            IF current_setting('statement_timeout') <> '0' OR current_setting('lock_timeout') <> '30min' THEN
                RAISE 'This step would be broken off.';
            END IF;
        END $$
    """
    store = PostgresStore(space)
    store.insert("job_1", submission())
    store.close()
    assert "from schema" not in caplog.text
    monkeypatch.setattr(postgres, "MIGRATIONS", (*postgres.MIGRATIONS, patient))
    link = postgres_link.PostgresLink(space, pooled=False, connections=1)
    try:
        with link.connect() as connection:
            postgres.migrate(connection)
            row = connection.execute("SELECT current_setting('statement_timeout') AS most").fetchone()
    finally:
        link.close()
    assert row == {"most": "15s"}
    assert f"from schema {len(postgres.MIGRATIONS) - 1} to" in caplog.text


def test_coordinators_that_start_together_make_one_schema(space: str) -> None:
    made: list[PostgresStore] = []
    threads = [threading.Thread(target=lambda: made.append(PostgresStore(space))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert len(made) == 4
    for store in made:
        store.close()


def test_of_several_hosts_the_one_that_is_there_and_takes_writes_is_used(space: str, tmp_path: Path) -> None:
    parts = conninfo_to_dict(space)
    hosts = make_conninfo(**{**parts, "host": f"{tmp_path},{parts['host']}"})
    store = PostgresStore(hosts)
    try:
        running(store, "job_1")
    finally:
        store.close()
    follower = make_conninfo(**{**parts, "options": f"{parts['options']} -cdefault_transaction_read_only=on"})
    with pytest.raises(StoreError):
        PostgresStore(follower)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("postgres://u:hunter2@127.0.0.1:1/db", "cannot be reached"),
        ("postgres://u:hunter2@127.0.0.1:port/db", "cannot be reached"),
        ("postgres://u:hunter2@/db?frob=1", "store: "),
    ],
)
def test_a_refusal_never_says_the_password(url: str, words: str) -> None:
    with pytest.raises(StoreError, match=words) as caught:
        PostgresStore(url)
    assert "hunter2" not in str(caught.value)
