"""What two replicas are to a client and to a worker: one coordinator."""

from __future__ import annotations

import itertools
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec
import pytest
from websockets.exceptions import InvalidStatus

from coordinator.replicas import frames
from coordinator.replicas.opening import ReplicaTable, open_doorway
from coordinator.replicas.replicas import Replicas
from coordinator.store.base import SILENT_MS
from coordinator.testing import FakeWorker, OfferedJob, Running, running
from coordinator.testing_link import RawWorker
from protocol import link_wire as wire
from tests.certificates import self_signed
from tests.coordinator.replicas.rig import PATIENCE_S, SECRET, Start, until

_numbers = itertools.count(1)
Two = tuple[Running, Running]


def model() -> str:
    return f"m{next(_numbers)}"


def offer(name: str) -> tuple[wire.ModelOffer, ...]:
    return (wire.ModelOffer(name=name, kinds=("llm",), engine="fake", slots=4),)


def replicas(one: Running) -> Replicas:
    found = one.coordinator.replicas
    assert found is not None
    return found


def serving(name: str, *there: Running) -> None:
    """Wait until all of these know that somebody serves the model."""

    def known(one: Running) -> bool:
        return any(served.name == name for served in one.coordinator.parts.dispatcher.models())

    until(lambda: all(known(one) for one in there))


def chat(name: str, **more: Any) -> dict[str, Any]:
    return {"model": name, "messages": [{"role": "user", "content": "hi"}], **more}


def deltas(lines: list[str]) -> str:
    text = ""
    for line in lines:
        if line.startswith("data: {"):
            for choice in json.loads(line[6:])["choices"]:
                text += choice["delta"].get("content") or ""
    return text


def words(job: OfferedJob, count: int = 20, pause: float = 0.0) -> None:
    job.started()
    for n in range(count):
        job.chunk({"delta": {"content": f"w{n} "}})
        if pause:
            job.cancelled.wait(pause)
    job.complete({"content": "".join(f"w{n} " for n in range(count))})


def test_tokens_reach_the_client_at_another_replica(two: Two) -> None:
    here, there = two
    name = model()
    gate = threading.Event()

    def script(job: OfferedJob) -> None:
        job.started()
        job.chunk({"delta": {"content": "first "}})
        assert gate.wait(PATIENCE_S)  # the client has read the first one before there is a second
        job.chunk({"delta": {"content": "second"}})
        job.complete({"content": "first second"})

    with FakeWorker(there, offer(name), script, name):
        serving(name, here)
        with httpx.Client(base_url=here.url, headers=here.headers, timeout=PATIENCE_S) as client:
            with client.stream("POST", "/v1/chat/completions", json=chat(name, stream=True)) as answer:
                seen = []
                for line in answer.iter_lines():
                    seen.append(line)
                    if "first" in line:
                        gate.set()
    assert deltas(seen) == "first second"
    assert seen[-2:] == ["data: [DONE]", ""] or "data: [DONE]" in seen


def test_the_page_of_numbers_tells_how_the_others_are_reached(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = two
    peer = next(peer for peer in replicas(here).peers if peer.name == replicas(there).name)
    monkeypatch.setattr(peer, "dropped", 7)

    def number(name: str) -> int:
        lines = httpx.get(here.url + "/metrics", headers=here.headers, timeout=PATIENCE_S).text.splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith(f"bulkhead_coordinator_{name} ")))

    until(lambda: number("peers") == number("peers_connected") >= 1)
    assert number("peer_frames_dropped_total") >= 7


def test_somebody_may_follow_a_job_at_any_replica(two: Two) -> None:
    here, there = two
    name = model()
    gate = threading.Event()

    def script_words(job: OfferedJob) -> None:
        assert gate.wait(PATIENCE_S)
        words(job, 5)

    with FakeWorker(here, offer(name), script_words, name):
        with httpx.Client(headers=here.headers, timeout=PATIENCE_S) as client:
            body = {"kind": "llm", "model": name, "params": {"prompt": "x"}, "stream": True}
            job = client.post(f"{here.url}/v1/jobs", json=body).json()["id"]
            with client.stream("GET", f"{there.url}/v1/jobs/{job}/events") as answer:
                lines = []
                for line in answer.iter_lines():
                    lines.append(line)
                    if line == "event: job":
                        until(lambda: job in replicas(here)._followers)
                        gate.set()
    assert sum(line == "event: chunk" for line in lines) == 5
    assert "event: ended" in lines
    until(lambda: job not in replicas(here)._followers)


@pytest.mark.parametrize("how", ["the client leaves", "asked here", "asked there"])
def test_a_job_that_runs_elsewhere_is_cancelled_by_word_of_the_peers(
    two: Two, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = two
    for one in two:  # the rows, which would tell it in two looks, do not
        monkeypatch.setattr(replicas(one)._directory, "ended_of", lambda _jobs: [])
    name = model()
    jobs: list[OfferedJob] = []
    stopped = threading.Event()

    def script(job: OfferedJob) -> None:
        jobs.append(job)
        job.started()
        assert job.cancelled.wait(PATIENCE_S)
        stopped.set()
        job.complete({"content": ""})

    with FakeWorker(there, offer(name), script, name):
        serving(name, here)
        with httpx.Client(headers=here.headers, timeout=PATIENCE_S) as client:
            if how == "the client leaves":
                with client.stream("POST", f"{here.url}/v1/chat/completions", json=chat(name, stream=True)):
                    until(lambda: jobs)
            else:
                body = {"kind": "llm", "model": name, "params": {"prompt": "x"}}
                job = client.post(f"{here.url}/v1/jobs", json=body).json()["id"]
                until(lambda: jobs)
                at = here if how == "asked here" else there
                assert client.post(f"{at.url}/v1/jobs/{job}/cancel").json()["state"] == "cancelled"
        assert stopped.wait(PATIENCE_S)


def port(one: Running) -> int:
    found = urlsplit(one.url).port
    assert found is not None
    return found


def test_an_admin_sees_and_orders_workers_of_all_replicas(two: Two) -> None:
    here, there = two
    name = model()
    admin = {"authorization": f"Bearer {here.coordinator.keys.create('admin', name='a')}"}
    with (
        RawWorker(port(there), name, there.worker_token) as worker,
        httpx.Client(headers=admin, timeout=PATIENCE_S) as client,
    ):
        worker.hello(*offer(name))
        serving(name, here)
        for one in two:
            listed = client.get(f"{one.url}/v1/workers").json()["data"]
            assert [row["models"] for row in listed if row["id"] == name] == [[name]]
        said = client.post(f"{here.url}/v1/workers/{name}/pause", json={"reason": "lunch"})
        assert (said.status_code, said.json()["said"]) == (202, "pause")
        assert worker.expect(wire.Pause).body.reason == "lunch"
        with ThreadPoolExecutor(1) as pool:
            body = {"verb": "probe", "arguments": {"model": name}}
            asked = pool.submit(client.post, f"{here.url}/v1/workers/{name}/order", json=body)
            order = worker.expect(wire.Order).body
            assert (order.verb, order.arguments) == ("probe", {"model": name})
            worker.send(wire.OrderDone(id=order.id, ok=True, message="It went well."))
            answer = asked.result(PATIENCE_S)
        assert (answer.status_code, answer.json()["message"]) == (200, "It went well.")
        assert client.post(f"{here.url}/v1/workers/nobody/pause").status_code == 404


def test_a_worker_that_comes_to_another_replica_leaves_no_dead_session_behind(two: Two) -> None:
    here, there = two
    name = model()
    with RawWorker(port(here), name, here.worker_token) as dead, RawWorker(port(there), name, here.worker_token) as new:
        dead.hello(*offer(name))
        job = httpx.post(
            f"{here.url}/v1/jobs", headers=here.headers, json={"kind": "llm", "model": name, "params": {"prompt": "x"}}
        ).json()["id"]
        taken = dead.take()
        new.hello(*offer(name), held=(wire.Held(taken.job, taken.attempt, True),))
        assert dead.expect_close() == (None, 1001)
        assert new.complete(taken).verdict == "stored"
        assert httpx.get(f"{there.url}/v1/jobs/{job}", headers=here.headers).json()["state"] == "succeeded"


def test_a_model_that_only_another_replica_serves_is_listed_and_not_refused(two: Two) -> None:
    here, there = two
    name = model()
    with httpx.Client(base_url=here.url, headers=here.headers, timeout=PATIENCE_S) as client:
        assert client.post("/v1/chat/completions", json=chat(name)).status_code in (404, 503)
        with FakeWorker(there, offer(name), words, name):
            serving(name, here)
            assert name in [one["id"] for one in client.get("/v1/models").json()["data"]]
            answer = client.post("/v1/chat/completions", json=chat(name))
            assert answer.json()["choices"][0]["message"]["content"].startswith("w0 w1 ")


def test_an_end_that_nobody_told_of_is_found_in_the_database(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = two
    name = model()
    for peer in replicas(there).peers:
        monkeypatch.setattr(peer, "push", lambda _frame, *, urgent=False: False)
    dispatcher = here.coordinator.parts.dispatcher
    monkeypatch.setattr(dispatcher, "settings", msgspec.structs.replace(dispatcher.settings, repair_s=600))
    with FakeWorker(there, offer(name), words, name):
        serving(name, there)
        body = {
            "kind": "llm",
            "model": name,
            "params": {"prompt": "x"},
            "wait": PATIENCE_S - 10,
            "wait_for_worker": True,
        }
        with httpx.Client(base_url=here.url, headers=here.headers, timeout=PATIENCE_S) as client:
            answer = client.post("/v1/jobs", json=body)
            assert answer.json()["state"] == "succeeded"  # a silent watcher alone would look after ten minutes
            text = chat(name, stream=True)
            with client.stream("POST", "/v1/chat/completions", json=text, headers={"x-bulkhead-begin-s": "60"}) as all_:
                lines = list(all_.iter_lines())
    if all_.status_code == 200:
        assert deltas(lines) == "".join(f"w{n} " for n in range(20))
    else:  # this replica has not heard that the model is served
        assert all_.status_code in (404, 503)


def test_a_drained_replica_hands_its_workers_over_without_a_lost_token(two: Two, start: Start) -> None:
    """The client stays where it hangs; the worker goes elsewhere and says again what was not acknowledged."""
    here, _ = two
    old = start()
    until(lambda: all(peer.connected for one in (here, old) for peer in replicas(one).peers))
    until(lambda: replicas(old).name in [peer.name for peer in replicas(here).peers if peer.connected])
    name = model()
    with ThreadPoolExecutor(1) as pool, RawWorker(port(old), name, old.worker_token) as worker:
        worker.hello(*offer(name))

        def follow() -> list[str]:
            with httpx.Client(base_url=old.url, headers=old.headers, timeout=PATIENCE_S) as client:
                with client.stream("POST", "/v1/chat/completions", json=chat(name, stream=True)) as answer:
                    return list(answer.iter_lines())

        lines = pool.submit(follow)
        job = worker.take()
        for seq in range(3):
            worker.chunk(job, seq)
        until(lambda: old.coordinator.parts.dispatcher.counters.events["chunks"] == 3)
        old.call(old.coordinator.hand_over)
        assert worker.expect_close() == (None, 1001)
        assert httpx.get(f"{old.url}/healthz").status_code == 503
        with pytest.raises(InvalidStatus, match="503"):
            RawWorker(port(old), name, old.worker_token)
        with RawWorker(port(here), name, old.worker_token) as again:
            again.hello(*offer(name), held=(wire.Held(job.job, job.attempt, True),))
            for seq in range(1, 5):  # the acknowledgements of 1 and 2 were lost, say
                again.chunk(job, seq)
            assert again.complete(job, {"content": "w0w1w2w3w4"}).verdict == "stored"
        assert deltas(lines.result(PATIENCE_S)) == "w0w1w2w3w4"
        assert "data: [DONE]" in lines.result()


def test_what_was_lost_between_replicas_comes_with_the_end(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow peer drops tokens: the client sees those before the gap, silence, and the rest with the end."""
    here, there = two
    name = model()
    peer = next(peer for peer in replicas(there).peers if peer.name == replicas(here).name)
    push = peer.push

    def lossy(frame: frames.Frame, *, urgent: bool = False) -> bool:
        return not (isinstance(frame, frames.ChunkFrame) and 3 <= frame.seq < 6) and push(frame, urgent=urgent)

    monkeypatch.setattr(peer, "push", lossy)
    with FakeWorker(there, offer(name), words, name), httpx.Client(headers=here.headers, timeout=PATIENCE_S) as client:
        serving(name, here)
        with client.stream("POST", f"{here.url}/v1/chat/completions", json=chat(name, stream=True)) as answer:
            lines = list(answer.iter_lines())
    assert deltas(lines) == "".join(f"w{n} " for n in range(20))
    assert "data: [DONE]" in lines


def test_replicas_may_speak_over_tls(apart: str, tmp_path: Path) -> None:
    """Each judges the other's certificate by `tls_ca`; the wire is wss."""
    from coordinator.store.postgres import PostgresStore

    pem, key = self_signed(tmp_path)
    (tmp_path / "secret").write_text(SECRET)
    table = ReplicaTable(
        listen="127.0.0.1:0",
        secret_file=str(tmp_path / "secret"),
        tls_cert=str(pem),
        tls_key=str(key),
        tls_ca=str(pem),
    )
    with ExitStack() as stack:
        pair = [
            stack.enter_context(
                running(tmp_path / "state", open_store=lambda: PostgresStore(apart), doorway=open_doorway(table))
            )
            for _ in range(2)
        ]
        first, second = (replicas(one) for one in pair)
        until(
            lambda: [peer.url[:6] for peer in first.peers if peer.name == second.name and peer.connected] == ["wss://"]
        )
        until(
            lambda: [peer.url[:6] for peer in second.peers if peer.name == first.name and peer.connected] == ["wss://"]
        )


@pytest.mark.parametrize("believed", ["here", "gone"])
def test_a_replica_ends_though_another_one_takes_no_leave(apart: str, tmp_path: Path, believed: str) -> None:
    """An event loop that is closed with a connection in it warns, and may not close at all."""
    from coordinator.store.postgres import PostgresStore

    (tmp_path / "secret").write_text(SECRET)
    table = ReplicaTable(listen="127.0.0.1:0", secret_file=str(tmp_path / "secret"))
    stuck, go_on = threading.Event(), threading.Event()

    def stand_still() -> None:
        stuck.set()
        go_on.wait(2 * PATIENCE_S)

    def started() -> AbstractContextManager[Running]:
        return running(tmp_path / "state", open_store=lambda: PostgresStore(apart), doorway=open_doorway(table))

    with started() as other:
        try:
            with started() as one:
                name = replicas(other).name
                until(lambda: name in [peer.name for peer in replicas(one).peers if peer.connected])
                other.loop.call_soon_threadsafe(stand_still)
                assert stuck.wait(PATIENCE_S)
                if believed == "gone":
                    one.coordinator._store.shift_clock(SILENT_MS)
                    until(lambda: name not in [peer.name for peer in replicas(one).peers])
        finally:
            go_on.set()


def test_lines_of_a_job_are_found_at_whatever_replica_its_worker_told_them_to(two: Two) -> None:
    here, there = two
    name = model()

    def script(job: OfferedJob) -> None:
        worker.send(wire.LogBatch(lines=(wire.LogLine("then", "warning", "slow", job.id),)))
        job.complete({"content": "x"})

    with FakeWorker(there, offer(name), script, name) as worker:
        serving(name, here)
        body = {"kind": "llm", "model": name, "params": {"prompt": "p"}, "wait": True, "wait_for_worker": True}
        made = httpx.post(here.url + "/v1/jobs", json=body, headers=here.headers, timeout=PATIENCE_S)
        assert made.is_success, made.text
        job = made.json()["id"]
        boss = {"authorization": f"Bearer {here.coordinator.keys.create('admin')}"}
        for replica in two:
            found: dict[str, Any] = {"not_asked": ["nobody yet"]}

            def answered(replica: Running = replica) -> bool:
                nonlocal found
                found = httpx.get(f"{replica.url}/v1/admin/jobs/{job}/logs", headers=boss, timeout=PATIENCE_S).json()
                return found.get("not_asked") == [] and bool(found["data"])

            until(answered)  # the key may be new to the other one, or the others be out of sight for a moment
            assert [(one["worker"], one["message"]) for one in found["data"]] == [(name, "slow")]
