"""Workers that speak the studio contract: the eleven rules of a session, each over real HTTP and real sockets."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs
from websockets.exceptions import ConnectionClosed, InvalidStatus

from coordinator.studio.session import StudioSettings
from coordinator.testing import running
from coordinator.testing_studio import PATIENCE_S
from tests.coordinator.studio_rig import ANSWER, CHAT, FAST, House, opened, until

CLOCK_S = 0.01  # the server's loop knows the time to the millisecond only

# ---- 1: who may connect ------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["", "wrong", "bhs_" + "a" * 43])
def test_rule_1_a_wrong_token_is_answered_401(house: House, token: str) -> None:
    with pytest.raises(InvalidStatus) as refused:
        house.worker().open(token=token)
    assert refused.value.response.status_code == 401


def test_rule_1_the_token_of_another_worker_is_wrong(house: House) -> None:
    with pytest.raises(InvalidStatus) as refused:
        house.worker().open(token=house.worker().token)
    assert refused.value.response.status_code == 401


def test_rule_1_the_sub_protocol_is_asked_for_and_echoed(house: House) -> None:
    worker = house.worker()
    with pytest.raises(InvalidStatus) as refused:
        worker.open(subprotocol=None)
    assert refused.value.response.status_code == 400
    with worker.open() as it:
        assert it.socket.subprotocol == "studio-worker-v1"


def test_rule_1_a_token_that_was_replaced_is_no_token(house: House) -> None:
    worker = house.worker()
    old = worker.token
    worker.poll()
    assert worker.token != old
    with pytest.raises(InvalidStatus):
        worker.open(token=old)
    worker.session().drop()


def test_rule_1_a_wrong_token_in_hello_is_4001(house: House) -> None:
    with house.worker().open() as it:
        it.send("hello", authToken="wrong", capabilities=it.worker.said)
        assert it.ending() == ("auth_failed", 4001)


# ---- 2: hello first ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("frame", ["heartbeat", "accept", "readyForMore"])
def test_rule_2_nothing_goes_before_hello(house: House, frame: str) -> None:
    with house.worker().open() as it:
        it.send(frame, jobId="x", capabilities={})
        first = it.receive()
        assert first == {"type": "error", "code": "protocol_violation", "message": "session not authenticated"}
        assert it.ending() == (None, 4002)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"type":1}', "not json", "[" * 100_000, '{"type":"hello"}', "\ud800"]
)
def test_rule_2_what_is_no_hello_ends_it(house: House, text: str) -> None:
    with house.worker().open() as it:
        it.socket.send(text.encode("utf-8", "surrogatepass"), text=True)
        error, code = it.ending()
        assert code in (4002, 1007)  # 1007 is the WebSocket layer's own word for text that is no UTF-8
        assert error in ("protocol_violation", None)


def test_rule_2_silence_instead_of_hello_ends_it(tmp_path: Path) -> None:
    with running(tmp_path, studio=structs.replace(FAST, hello_s=0.5)) as there, opened(there) as house:
        with house.worker().open() as it:
            assert it.ending() == ("protocol_violation", 4002)


def test_a_binary_frame_ends_it(house: House) -> None:
    with house.worker().session() as it:
        it.socket.send(b'{"type":"heartbeat"}')
        assert it.ending() == ("protocol_violation", 4002)


def test_a_giant_frame_ends_it(house: House) -> None:
    with house.worker().session() as it:
        with contextlib.suppress(ConnectionClosed):
            it.socket.send("x" * (5 * 2**20))
        assert it.ending()[1] in (1009, 1006)  # 1006 where the rest of the frame was still on its way
    assert house.client.get("/healthz").status_code == 200


# ---- 3: one socket per worker ------------------------------------------------------------------------------


def test_rule_3_the_older_socket_is_closed_with_4003(house: House) -> None:
    worker = house.worker()
    with worker.session() as older, worker.session() as newer:
        assert older.ending() == ("duplicate_worker", 4003)
        newer.beat()
        assert house.seen(worker)


# ---- 4: offers ---------------------------------------------------------------------------------------------


def test_rule_4_welcome_names_worker_and_time(house: House) -> None:
    with house.worker().open() as it:
        welcome = it.hello()
        assert welcome["workerId"] == it.worker.id
        assert welcome["serverTime"].endswith("Z")


def test_rule_4_one_offer_at_a_time_over_all_models(house: House) -> None:
    jobs = [house.submit(), house.submit("image", {"prompt": "p"}), house.submit()]
    with house.worker().session() as it:
        done = []
        for _ in jobs:
            claim = it.claim()
            assert it.quiet(0.2)
            it.send("fail", jobId=claim["jobId"], error="no", retryable=False)
            assert it.expect("failAck")["jobId"] == claim["jobId"]
            done.append(claim["jobId"])
        assert sorted(done) == sorted(jobs)
        seen = house.seen(it.worker)
        assert seen is not None
        assert seen["slots"] == 1


@pytest.mark.parametrize(
    "off", [{"autoEnabled": False}, {"onlyWhenIdle": True}, {"onlyWhenIdle": True, "userPresence": "active"}]
)
def test_rule_4_who_is_off_is_offered_nothing_until_it_says_so(house: House, off: dict[str, Any]) -> None:
    job = house.submit()
    with house.worker().session(**off) as it:
        assert it.quiet()
        on = {"userPresence": "idle", "onlyWhenIdle": True}
        it.beat(**on)
        assert it.claim()["jobId"] == job


def test_rule_4_vram_and_kind_have_to_fit(house: House) -> None:
    house.submit(vram_gb_estimate=12)
    house.submit("image", {"prompt": "p"})
    with house.worker().session(vramThresholdGb=8, taskKinds=["llm"]) as it:
        assert it.quiet(0.6)
        fits = house.submit(vram_gb_estimate=8)
        assert it.claim()["jobId"] == fits


def test_rule_4_the_earliest_connected_wins(house: House) -> None:
    for _ in range(3):  # ids are random, so their order must not decide
        with house.worker().session() as first, house.worker().session() as second:
            job = house.submit()
            assert first.claim()["jobId"] == job
            assert second.quiet(0.1)
            first.send("fail", jobId=job, error="no", retryable=False)
            first.expect("failAck")


def test_old_workers_that_name_no_kinds_make_images(house: House) -> None:
    job = house.submit("image", {"prompt": "p"})
    old = {"supportedModelsPerKind": {}, "taskKinds": [], "supportedModels": [f"{house.tag}-image"]}
    with house.worker().session(**old) as it:
        assert it.claim()["jobId"] == job


# ---- 5: heartbeats -----------------------------------------------------------------------------------------


def test_rule_5_heartbeats_are_answered_and_null_is_no_job(house: House) -> None:
    with house.worker().session() as it:
        it.beat()
        it.beat(currentJobId=None)


def test_rule_5_a_heartbeat_that_cannot_be_read_costs_nothing(house: House) -> None:
    with house.worker().session() as it:
        it.send("heartbeat", capabilities={"vramTotalGb": "much"})
        it.beat()


def test_rule_5_changed_models_are_known_at_once(house: House) -> None:
    def served() -> list[str]:
        names = [one["id"] for one in house.client.get("/v1/models").json()["data"]]
        return [name for name in names if name.startswith(f"{house.tag}-")]

    first, second = f"{house.tag}-1", f"{house.tag}-2"
    with house.worker().session(supportedModelsPerKind={"llm": [first]}) as it:
        assert served() == [first]
        it.beat(supportedModelsPerKind={"llm": [first, second]})
        assert served() == [first, second]


# ---- 6: jobs of others -------------------------------------------------------------------------------------

OF_JOBS: list[tuple[str, dict[str, Any]]] = [
    ("accept", {}),
    ("fail", {"error": "x", "retryable": True}),
    ("completeJson", {"result": ANSWER}),
]


@pytest.mark.parametrize(("frame", "fields"), OF_JOBS)
def test_rule_6_what_a_session_does_not_hold_is_4002(house: House, frame: str, fields: dict[str, Any]) -> None:
    with house.worker().session() as holder, house.worker().session() as other:
        job = house.submit()
        assert holder.claim()["jobId"] == job
        other.send(frame, jobId=job, **fields)
        assert other.ending() == ("protocol_violation", 4002)
        until(lambda: house.job(job)["state"] == "running")
        holder.send("completeJson", jobId=job, result=ANSWER)
        holder.expect("completeAck")
    assert house.result(job)["content"] == "Hello you"


# ---- 7: endings --------------------------------------------------------------------------------------------


def test_rule_7_a_chat_is_stored_acknowledged_and_the_next_is_offered(house: House) -> None:
    with house.worker().session() as it:
        first, second = house.chat(temperature=0.1), None
        claim = it.claim()
        assert claim["task"] == {"kind": "llm", "messages": CHAT["messages"], "temperature": 0.1}
        assert claim["modelSource"]["engine"] == "llama-cpp"
        assert {"gameId", "assetName", "vramGbEstimate", "model"} <= set(claim)
        second = house.submit()
        it.send("completeJson", jobId=claim["jobId"], result=ANSWER, prompt="user: Hi")
        assert it.expect("completeAck")["jobId"] == claim["jobId"]
        assert it.claim()["jobId"] == second
    answer = first.result().json()
    assert answer["choices"][0]["message"]["content"] == "Hello you"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def test_rule_7_a_failure_that_may_be_retried_is_until_tries_are_used_up(house: House) -> None:
    job = house.submit(max_attempts=2)
    with house.worker().session() as it:
        for _ in range(2):
            assert it.claim()["jobId"] == job
            it.send("fail", jobId=job, error="out of memory", retryable=True)
            assert it.expect("failAck")["jobId"] == job
    seen = house.ended(job)
    assert seen["state"] == "failed"
    assert "out of memory" in seen["fault"]["message"]


def test_rule_7_a_failure_for_good_is_one(house: House) -> None:
    job = house.submit()
    with house.worker().session() as it:
        it.claim()
        it.send("fail", jobId=job, error="no such kind", retryable=False)
        it.expect("failAck")
    assert (house.job(job)["state"], house.job(job)["fault"]["message"]) == ("failed", "no such kind")


def test_an_end_said_twice_is_acknowledged_twice_and_counts_once(house: House) -> None:
    job, failed = house.submit(), ""
    with house.worker().session() as it:
        it.claim()
        for _ in range(2):
            it.send("completeJson", jobId=job, result=ANSWER)
            assert it.expect("completeAck")["jobId"] == job
        failed = house.submit()
        it.claim()
        for _ in range(2):
            it.send("fail", jobId=failed, error="no", retryable=False)
            assert it.expect("failAck")["jobId"] == failed
        it.beat()
    assert house.job(job)["state"] == "succeeded"
    assert house.job(failed)["state"] == "failed"
    assert f'usage_total{{model="{house.tag}-llm",what="prompt_tokens"}} 3' in house.client.get("/metrics").text


@pytest.mark.parametrize(
    "result",
    [None, [], "text", {"choices": []}, {"choices": [{"message": {"content": 5}}]},
     {**ANSWER, "usage": {"prompt_tokens": -1}},
     {"choices": [{"message": {"content": "x"}, "finish_reason": "because"}]}],
)  # fmt: skip
def test_a_result_of_the_wrong_shape_fails_its_job_and_not_the_session(house: House, result: Any) -> None:
    job = house.submit(max_attempts=1)
    with house.worker().session() as it:
        it.claim()
        it.send("completeJson", jobId=job, result=result)
        assert it.expect("completeAck")["jobId"] == job
        it.beat()
    assert house.ended(job)["fault"]["code"] == "engine_protocol"


@pytest.mark.parametrize(
    ("frame", "fields", "acknowledged"),
    [("completeJson", {}, "completeAck"), ("fail", {"error": 5, "retryable": "perhaps"}, "failAck")],
)
def test_a_frame_that_cannot_be_read_costs_its_job_alone(
    house: House, frame: str, fields: dict[str, Any], acknowledged: str
) -> None:
    job = house.submit(max_attempts=1)
    with house.worker().session() as it:
        it.claim()
        it.send(frame, jobId=job, **fields)
        assert it.expect(acknowledged)["jobId"] == job
        it.beat()
    assert house.ended(job)["fault"]["code"] == "engine_protocol"


def test_frames_of_newer_workers_and_fields_that_nobody_knows_are_passed_over(house: House) -> None:
    with house.worker().session(ofTomorrow=[1]) as it:
        it.send("progress", jobId="x", percent=5)
        it.send("readyForMore")
        it.send("heartbeat", capabilities={**it.worker.said, "more": {}}, mood="good")
        it.expect("heartbeatAck")


# ---- 8: rejects --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        {"code": "busy", "reason": "x"},
        {"code": "paused", "reason": "x"},
        {"reason": "worker paused by operator"},
        {"reason": "only when idle: the person is using this computer"},
        {"reason": "worker already has an in-flight job"},
    ],
)
def test_rule_8_busy_costs_no_try_and_is_not_asked_again_at_once(house: House, said: dict[str, str]) -> None:
    job = house.submit(max_attempts=1)
    with house.worker().session() as it:
        rejected_at = float("-inf")
        for tries in range(3):
            assert it.claim(accept=tries == 2)["jobId"] == job
            assert time.monotonic() - rejected_at >= FAST.busy_s - CLOCK_S
            if tries < 2:
                rejected_at = time.monotonic()
                it.send("reject", jobId=job, **said)
        it.send("completeJson", jobId=job, result=ANSWER)
        it.expect("completeAck")
    assert house.job(job)["tries"] == 1


def test_rule_8_other_rejects_send_the_job_elsewhere(house: House) -> None:
    with house.worker().session() as first, house.worker().session() as second:
        job = house.submit()
        first.claim(accept=False)
        first.send("reject", jobId=job, reason="unknown engine slug")
        assert second.claim()["jobId"] == job
        assert first.quiet(0.2)


def test_rule_8_what_everybody_rejects_ends_with_the_reason(house: House) -> None:
    with house.worker().session() as it:
        job = house.submit()
        it.claim(accept=False)
        it.send("reject", jobId=job, reason="unknown engine slug")
        seen = house.ended(job)
    assert seen["fault"]["code"] == "unsupported"
    assert "unknown engine slug" in seen["fault"]["message"]


# ---- 9, 10: sockets that end, workers that are silent ------------------------------------------------------


@pytest.mark.parametrize("accept", [True, False])
def test_rule_9_a_lost_socket_gives_the_job_to_another(house: House, accept: bool) -> None:
    first = house.worker().session()
    job = house.submit()
    first.claim(accept=accept)
    with house.worker().session() as second:
        first.drop()
        assert second.claim()["jobId"] == job
        second.send("completeJson", jobId=job, result=ANSWER)
        second.expect("completeAck")


def test_rule_9_what_a_lost_session_held_is_not_held_by_the_next(house: House) -> None:
    worker = house.worker()
    job = house.submit(max_attempts=1)
    with worker.session() as it:
        it.claim()
    with worker.session() as it:
        it.send("completeJson", jobId=job, result=ANSWER)
        assert it.ending() == ("protocol_violation", 4002)
    assert house.ended(job)["fault"]["code"] == "worker_lost"


def test_rule_10_a_worker_without_heartbeat_is_let_go(tmp_path: Path) -> None:
    settings = structs.replace(FAST)
    with running(tmp_path, studio=settings) as there, opened(there) as house:
        _is_let_go(house, settings)


def _is_let_go(house: House, settings: StudioSettings) -> None:
    worker = house.worker()
    job = house.submit(max_attempts=1)
    with worker.session() as it:
        it.claim()
        until(lambda: house.job(job)["state"] == "running")
        structs.force_setattr(settings, "silence_s", 0.5)  # from here on: until it has the job, it may take its time
        stop = threading.Event()

        def chatter() -> None:
            with contextlib.suppress(ConnectionClosed):
                while not stop.wait(0.05):
                    it.send("logBatch", entries=[])

        talking = threading.Thread(target=chatter)
        talking.start()
        assert it.ending() == ("internal_error", 1000)
        stop.set()
        talking.join()
    assert house.ended(job)["fault"]["code"] == "worker_lost"
    assert house.seen(worker) is None


def test_a_drained_replica_lets_a_worker_end_what_it_cannot_take_along(tmp_path: Path) -> None:
    with running(tmp_path, studio=FAST) as there, opened(there) as house:
        busy, idle = house.worker(), house.worker()
        with busy.session() as it:
            job = house.submit()
            claim = it.claim()
            until(lambda: house.job(job)["state"] == "running")
            with idle.session() as other, ThreadPoolExecutor(1) as pool:
                handed_over = pool.submit(there.call, there.coordinator.parts.dispatcher.hand_over)
                assert other.ending() == (None, 1000)
                with pytest.raises(InvalidStatus, match="503"):
                    idle.open()
                assert not handed_over.done()
                it.send("completeJson", jobId=claim["jobId"], result=ANSWER, prompt="user: Hi")
                assert it.expect("completeAck")["jobId"] == job
                assert it.ending() == (None, 1000)
                handed_over.result(PATIENCE_S)
        assert house.job(job)["state"] == "succeeded"


def test_a_worker_that_was_put_out_is_told_4004(house: House) -> None:
    worker = house.worker()
    with worker.session() as it:
        house.admin.post(f"/v1/registrations/{worker.request}/reject", json={"reason": "sold"}).raise_for_status()
        assert it.ending() == ("worker_deleted", 4004)
    with pytest.raises(InvalidStatus):
        worker.open()


# ---- 11: a claim is one compare-and-set --------------------------------------------------------------------


def test_rule_11_one_job_is_claimed_once_among_many(house: House) -> None:
    sockets = [house.worker().session() for _ in range(6)]
    jobs = [house.submit() for _ in range(6)]
    claimed = [it.claim()["jobId"] for it in sockets]
    assert sorted(claimed) == sorted(jobs)
    for it, job in zip(sockets, claimed, strict=True):
        it.send("completeJson", jobId=job, result=ANSWER)
        it.expect("completeAck")
        it.drop()
    text = house.client.get("/metrics").text
    assert f'jobs_total{{kind="llm",model="{house.tag}-llm",outcome="succeeded"}} 6' in text


def test_rule_11_the_attempt_fences_what_comes_late(house: House) -> None:
    """A job that passed its deadline is not the worker's any more; its answer is acknowledged and dropped."""
    with house.worker().session() as it:
        job = house.submit()
        it.claim()
        house.client.post(f"/v1/jobs/{job}/cancel").raise_for_status()
        other = house.submit()
        assert it.quiet(0.2)  # it has no word for a cancel: its slot is taken until it ends
        it.send("completeJson", jobId=job, result=ANSWER)
        assert it.expect("completeAck")["jobId"] == job
        assert it.claim()["jobId"] == other
    assert house.job(job)["state"] == "cancelled"
    assert house.client.get(f"/v1/jobs/{job}/result").status_code != 200


# ---- clients that stream, admins that order ----------------------------------------------------------------


def test_a_stream_gets_the_answer_as_one_chunk(house: House) -> None:
    with house.worker().session() as it:
        asked = house.chat(stream=True)
        claim = it.claim()
        for _ in range(2):
            it.beat(currentJobId=claim["jobId"])
        it.send("completeJson", jobId=claim["jobId"], result=ANSWER)
        it.expect("completeAck")
    text = asked.result().text
    assert text.count("Hello you") == 1
    assert '"finish_reason":"stop"' in text
    assert text.rstrip().endswith("data: [DONE]")


def test_what_the_contract_cannot_say_is_refused_by_name(house: House) -> None:
    with house.worker().session() as it:
        answer = house.chat(seed=7).result()
        assert answer.status_code == 400
        assert "seed" in answer.json()["error"]["message"]
        assert it.quiet(0.1)
        house.submit()
        it.claim()


def test_lists_and_metrics_tell_the_protocol(house: House) -> None:
    with house.worker().session() as it:
        seen = house.seen(it.worker)
        assert seen is not None
        assert (seen["protocol"], seen["machine"], seen["version"]) == ("studio", "studio-box", "0.4.5")
        labels = f'worker="{it.worker.id}",protocol="studio"'
        assert f"worker_accepting{{{labels}}} 1" in house.client.get("/metrics").text


def test_an_admin_pauses_and_resumes(house: House) -> None:
    with house.worker().session() as it:
        way = f"/v1/workers/{it.worker.id}"
        assert house.admin.post(f"{way}/pause", json={"reason": "lunch"}).status_code == 202
        job = house.submit()
        assert it.quiet(0.2)
        it.beat()
        seen = house.seen(it.worker)
        assert seen is not None
        assert (seen["accepting"], seen["reason"]) == (False, "lunch")
        house.admin.post(f"{way}/resume")
        assert it.claim()["jobId"] == job
        house.admin.post(f"{way}/drain")
        order = house.admin.post(f"{way}/order", json={"verb": "probe"})
        assert order.status_code == 400
        assert "studio" in order.json()["error"]["message"]


def test_lines_of_its_log_are_in_ours(house: House, caplog: pytest.LogCaptureFixture) -> None:
    entry = {"ts": "2026-01-01T00:00:00Z", "level": "error", "category": "ws", "message": "broken\nfan"}
    with caplog.at_level("INFO", logger="coordinator.worker"), house.worker().session() as it:
        it.send("logBatch", entries=[entry, {**entry, "jobId": "job-1", "level": "silly"}])
        it.beat()
        first, second = [one for one in caplog.records if one.name == "coordinator.worker"]
    assert (first.levelname, first.getMessage()) == ("ERROR", f"{it.worker.id}: 'broken\\nfan'")
    assert (second.levelname, vars(second)["job"]) == ("INFO", "job-1")


def test_a_path_may_stand_before_the_base(house: House) -> None:
    worker = house.worker(base="/games/one/graphics/api")
    with worker.session() as it:
        job = house.submit()
        assert it.claim()["jobId"] == job
