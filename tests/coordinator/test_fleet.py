"""Who gets a job: pure, with times handed in."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import pytest

from coordinator import quarantine
from coordinator.fleet import AFAR_AGAIN_S, COLD_WAITS_MS, FOREVER, GONE_S, Fleet, HeldAttempt, Worker
from coordinator.quarantine import FIRST_PAUSE_S, Failing
from coordinator.records import JobRecord, Resting, WorkerView
from coordinator.store.base import Want
from coordinator.store.needs import needs_of
from protocol import link_wire as wire
from protocol.faults import Fault


class NoPort:
    def send(self, body: wire.Body, job: str = "", attempt: int = 0) -> None:
        raise AssertionError("the fleet sends nothing")

    def close(self, code: str, message: str) -> None:
        raise AssertionError("the fleet closes nothing")


def model(name: str = "chat", kinds: tuple[str, ...] = ("llm",), **options: Any) -> wire.ModelOffer:
    return wire.ModelOffer(**{"name": name, "kinds": kinds, "engine": "e", **options})


def worker(name: str, *models: wire.ModelOffer, busy: int = 0, **capabilities: Any) -> Worker:
    made = Worker(name, NoPort(), wire.Capabilities(models=models or (model(),), **capabilities))
    for n in range(busy):
        hold(made, f"busy{n}")
    return made


def hold(made: Worker, job: str, name: str = "chat", kind: str = "llm") -> None:
    made.attempts[job, 1] = HeldAttempt(job, 1, kind, name, "running")


def offered(**options: Any) -> HeldAttempt:
    return HeldAttempt(**{"job": "j", "attempt": 1, "kind": "llm", "model": "chat", "state": "offered", **options})


def fleet(*workers: Worker) -> Fleet:
    made = Fleet()
    for one in workers:
        made.add(one)
    return made


def record(job: str = "j", name: str = "chat", kind: str = "llm", **more: Any) -> JobRecord:
    fixed: dict[str, Any] = {"state": "queued", "tenant": "t", "attempt": 1, "created_ms": 0, "params": b"\x80"}
    return JobRecord(id=job, kind=kind, model=name, **fixed, **more)


def placed(made: Fleet, job: str = "j", now: float = 0.0, **options: Any) -> str | None:
    chosen = made.place(record(job, **options), now)
    return chosen.id if chosen else None


def test_a_loaded_model_comes_before_a_cold_one_even_when_busier() -> None:
    made = fleet(worker("cold", model(slots=9)), worker("warm", model(slots=3, resident=True), busy=2))
    assert placed(made) == "warm"


def test_among_equals_the_least_busy_share_wins() -> None:
    made = fleet(worker("a", model(slots=4), busy=2), worker("b", model(slots=4), busy=1), worker("c", model(), busy=1))
    assert placed(made) == "b"


def test_no_free_slot_no_offer() -> None:
    made = fleet(worker("a", model(slots=2), busy=2))
    assert made.wants(0.0) == []
    assert placed(made) is None


def test_slots_are_per_model_and_shared_by_its_kinds() -> None:
    both = model("both", ("llm", "embedding"), slots=2)
    one = worker("a", both, model("other"))
    made = fleet(one)
    hold(one, "x", "both", "embedding")
    assert made.wants(0.0) == [Want("both", ("embedding", "llm"), 1), Want("other", ("llm",), 1)]
    hold(one, "y", "both", "llm")
    assert made.wants(0.0) == [Want("other", ("llm",), 1)]
    assert placed(made, name="both", kind="llm") is None


def test_wants_sum_equal_announcements_over_workers() -> None:
    made = fleet(worker("a", model(slots=2)), worker("b", model(slots=3), busy=1), worker("c", model(kinds=())))
    assert made.wants(0.0) == [Want("chat", ("llm",), 4)]


@pytest.mark.parametrize("how", ["draining", "paused"])
def test_who_takes_nothing_is_offered_nothing(how: str) -> None:
    one = worker("a", accepting=how != "paused", reason="the operator paused it")
    one.draining = how == "draining"
    made = fleet(one)
    assert made.wants(0.0) == []
    assert placed(made) is None
    assert made.views()[0].accepting is False


def test_blocks_end_by_time_or_by_an_announcement() -> None:
    one = worker("a", model(), model("other"))
    made = fleet(one)
    one.block("chat", 5.0)
    one.block("chat", 3.0)
    assert [want.model for want in made.wants(4.9)] == ["other"]
    assert len(made.wants(5.0)) == 2
    one.block("", 50.0)
    assert made.wants(6.0) == []
    made.announce(one, one.capabilities)
    assert len(made.wants(6.0)) == 2


def test_a_job_avoids_who_declined_it() -> None:
    made = fleet(worker("a", model(resident=True)), worker("b"))
    made.refusals.avoid("j", "a", 10.0)
    assert placed(made, now=9.0) == "b"
    assert placed(made, "another", now=9.0) == "a"
    assert placed(made, now=10.0) == "a"
    assert made.others(offered(), "b", 9.0) is False
    assert made.others(offered(), "a", 9.0) is True
    made.refusals.forget("j")
    assert placed(made, now=9.0) == "a"


def test_a_job_that_failed_somewhere_goes_elsewhere_if_it_can() -> None:
    made = fleet(worker("a", model(resident=True)), worker("b"))
    made.refusals.shun("j", "a")
    assert placed(made) == "b"
    made.refusals.shun("j", "b")
    assert placed(made) == "a"
    made.refusals.forget("j")
    made.remove(made.workers["b"])
    made.refusals.shun("j", "a")
    assert placed(made) == "a"


def test_refused_by_all_needs_everybody_for_good() -> None:
    made = fleet(worker("a"), worker("b"), worker("c", model("other")))
    made.refusals.refuse("j", "a")
    made.refusals.avoid("j", "b", 1e9)
    assert not made.refused_by_all(offered())
    made.refusals.refuse("j", "b")
    assert made.refused_by_all(offered())
    assert not made.refused_by_all(offered(model="nobody serves this"))


def test_judge_says_what_is_wrong() -> None:
    made = Fleet()

    def code(kind: str = "llm", name: str = "chat") -> str | None:
        fault = made.judge(kind, name)
        return fault.code if fault else None

    assert code() == "no_worker"
    one, two = worker("a"), worker("b", model("other"))
    made.add(one)
    made.add(two)
    assert code() is None
    assert code(kind="image") == "unsupported"
    assert code(name="nope") == "model_not_found"
    fault = made.judge("llm", "nope")
    assert fault is not None
    assert "other" not in fault.message  # what is served is for /v1/models and its keys
    assert made.remove(one)
    assert code() == "no_worker"  # its worker will be back; the model is not unknown
    two.draining = True
    assert code(name="other") == "no_worker"


def test_a_newer_session_is_not_removed_by_the_end_of_the_older() -> None:
    older, newer = worker("a"), worker("a")
    made = fleet(older)
    made.add(newer)
    assert not made.remove(older)
    assert made.workers["a"] is newer


def test_models_are_summed_over_workers() -> None:
    made = fleet(
        worker("b", model(slots=2, limits={"n_ctx": 4096}, engine="x")),
        worker("a", model(slots=1, resident=True, kinds=("llm", "embedding"))),
        worker("c", model("zzz"), model("none", kinds=())),
    )
    chat, other = made.models()
    assert (chat.name, chat.kinds, chat.workers, chat.slots) == ("chat", ("embedding", "llm"), ("a", "b"), 3)
    assert (chat.limits, chat.engines, chat.resident) == ({"n_ctx": 4096}, ("e", "x"), True)
    assert (other.name, other.resident) == ("zzz", False)


def test_who_takes_one_job_at_once_has_one_slot_over_all_models() -> None:
    one = worker("a", model(slots=4), model("other"))
    one.at_once = 1
    made = fleet(one)
    assert one.slots == made.views()[0].slots == 1
    assert made.wants(0.0) == [Want("chat", ("llm",), 1), Want("other", ("llm",), 1)]
    hold(one, "x", "other", "llm")
    assert made.wants(0.0) == []
    assert placed(made) is None


def test_a_job_that_needs_more_memory_than_the_threshold_is_not_for_it() -> None:
    small, large = worker("a"), worker("b", model(slots=2), busy=1)
    small.vram_gb, large.vram_gb = 8.0, 16.0
    made = fleet(small, large)
    assert placed(made) == "a"
    assert placed(made, vram_gb_estimate=8.5) == "b"
    assert placed(made, vram_gb_estimate=17.0) is None


def test_of_equals_the_one_that_connected_first_is_taken() -> None:
    assert placed(fleet(worker("z"), worker("a"))) == "z"


# ---- labels and memory --------------------------------------------------------------------------------------

GIB = 2**30
TRUSTED = {"trusted": "true"}


def gpu(gb: int) -> wire.Gpu:
    return wire.Gpu(uuid=f"GPU-{gb}", name="A GPU", vram_bytes=gb * GIB)


@pytest.mark.parametrize(
    ("capabilities", "said", "expected"),
    [
        ({}, None, None),
        ({"gpus": (gpu(24), gpu(16))}, None, 40.0),
        ({"gpus": (gpu(24),), "vram_threshold_gb": 10.0}, None, 10.0),
        ({"gpus": (gpu(24),), "vram_threshold_gb": 10.0}, 0.0, 0.0),
    ],
)
def test_how_much_memory_a_job_may_need(
    capabilities: dict[str, Any], said: float | None, expected: float | None
) -> None:
    one = worker("a", **capabilities)
    one.vram_gb = said
    assert one.room_gb == expected


def test_a_job_is_placed_where_its_labels_and_its_memory_are() -> None:
    made = fleet(worker("plain"), worker("small", labels=TRUSTED, gpus=(gpu(8),)), worker("large", gpus=(gpu(80),)))
    assert placed(made, needs=needs_of(TRUSTED, 0)) == "small"
    assert placed(made, needs=needs_of(TRUSTED, 9), vram_gb_estimate=9.0) is None
    made.remove(made.workers["plain"])
    assert placed(made, needs=needs_of({}, 9), vram_gb_estimate=9.0) == "large"


def test_workers_are_told_apart_by_what_is_asked_for_and_by_nothing_else() -> None:
    made = fleet(*(worker(f"w{n}", labels={"name": str(n), **(TRUSTED if n < 2 else {})}) for n in range(5)))
    assert made.wants(0.0) == [Want("chat", ("llm",), 5)]
    made.ask(TRUSTED)
    told = [Want("chat", ("llm",), 2, frozenset(TRUSTED.items())), Want("chat", ("llm",), 3)]
    assert made.wants(0.0) == told
    made.asked(frozenset())  # looked up before the job was there
    assert made.wants(0.0) == told
    made.asked(frozenset())
    assert made.wants(0.0) == [Want("chat", ("llm",), 5)]
    made.asked(frozenset(TRUSTED.items()))
    assert made.wants(0.0) == told
    assert len(fleet(worker("a", gpus=(gpu(8),)), worker("b", gpus=(gpu(80),))).wants(0.0)) == 2


def test_a_job_is_not_asked_for_while_all_who_are_free_avoid_it() -> None:
    made = fleet(worker("a", model(slots=2)), worker("b"))
    made.refusals.avoid("j", "a", FOREVER)
    assert [want.but for want in made.wants(0.0)] == [()]
    hold(made.workers["b"], "another")
    assert [(want.limit, want.but) for want in made.wants(0.0)] == [(2, ("j",))]
    made.refusals.avoid("k", "a", 5.0)
    assert [want.but for want in made.wants(4.9)] == [("j", "k")]
    assert [want.but for want in made.wants(5.0)] == [("j",)]


def test_refused_by_all_asks_only_those_that_could_have_it() -> None:
    made = fleet(worker("a", labels=TRUSTED), worker("b"))
    made.refusals.refuse("j", "a")
    assert not made.refused_by_all(offered())
    trusted = offered(needs=needs_of(TRUSTED, 0))
    assert made.refused_by_all(trusted)
    assert not made.others(trusted, "a", 0.0)
    assert made.others(offered(), "a", 0.0)


@pytest.mark.parametrize(
    ("labels", "vram", "field", "words"),
    [
        (TRUSTED, 8.0, None, ""),
        ({}, 80.0, None, ""),
        ({"trusted": "yes", "pool": "eu"}, 0.0, "labels", "pool=eu, trusted=yes"),
        (TRUSTED, 8.5, "vram_gb_estimate", "8.5 GB, the most is 8"),
        ({}, 81.0, "vram_gb_estimate", "81 GB, the most is 80"),
    ],
)
def test_what_nobody_has_is_said_at_once(labels: dict[str, str], vram: float, field: str | None, words: str) -> None:
    made = fleet(worker("a", labels=TRUSTED, gpus=(gpu(8),)), worker("b", gpus=(gpu(80),)))
    fault = made.judge("llm", "chat", labels, vram)
    if field is None:
        assert fault is None
        return
    assert fault is not None
    assert (fault.code, fault.field) == ("no_worker", field)
    assert words in fault.message
    assert "wait_for_worker" in fault.message


# ---- load ---------------------------------------------------------------------------------------------------


def shared(made: Fleet, jobs: int) -> list[str]:
    """Who gets each of so many jobs that come one after another and go on; "" when nobody has a slot."""
    names = []
    for n in range(jobs):
        name = placed(made, f"job{n}") or ""
        if name:
            hold(made.workers[name], f"job{n}")
        names.append(name)
    return names


def test_workers_share_a_model_by_their_free_slots() -> None:
    made = fleet(worker("a", model(slots=6)), worker("b", model(slots=3)), worker("c", model(slots=3)))
    names = shared(made, 13)
    assert names[12] == ""
    assert {name: names.count(name) for name in "abc"} == {"a": 6, "b": 3, "c": 3}
    assert set(names[:3]) == {"a", "b", "c"}, "none stands idle while another takes its second"
    assert sum(want.limit for want in made.wants(0.0)) == 0


def test_the_loaded_ones_fill_up_before_a_cold_one_is_woken() -> None:
    made = fleet(
        worker("cold", model(slots=4)),
        worker("warm", model(slots=2, resident=True)),
        worker("warm too", model(slots=2, resident=True)),
    )
    names = shared(made, 6)
    assert sorted(names[:4]) == ["warm", "warm", "warm too", "warm too"]
    assert names[4:] == ["cold", "cold"]


# ---- workers on which job after job fails -------------------------------------------------------------------


def fails(made: Fleet, name: str, *jobs: str, now: float = 0.0, code: str = "engine_failed") -> Failing | None:
    """Jobs that were offered to this worker a moment ago fail there; returns what the last of them led to."""
    told = None
    for job in jobs:
        told = made.failed(made.workers[name], offered(job=job, since=now - 0.1), Fault(code, "It broke."), now)
    return told


def test_who_fails_job_after_job_is_offered_nothing_while_others_work() -> None:
    made = fleet(worker("bad", model(slots=2)), worker("good", model(slots=2), busy=1))
    assert fails(made, "bad", "j1", "j2") is None
    assert placed(made) == "bad"  # the least busy
    assert fails(made, "bad", "j3") is not None
    assert (placed(made), [want.limit for want in made.wants(0.0)]) == ("good", [1])
    assert made.judge("llm", "chat", now=0.0) is None


def test_after_its_rest_it_gets_one_job_at_a_time_until_one_succeeds() -> None:
    made = fleet(worker("bad", model(slots=4)), worker("good", busy=1))
    bad = made.workers["bad"]
    fails(made, "bad", "j1", "j2", "j3")
    assert made.wants(FIRST_PAUSE_S - 0.1) == []
    assert [want.limit for want in made.wants(FIRST_PAUSE_S)] == [1]
    hold(bad, "tried")
    assert made.wants(FIRST_PAUSE_S) == []
    assert made.succeeded(bad, "chat") is not None
    del bad.attempts["tried", 1]
    assert [want.limit for want in made.wants(FIRST_PAUSE_S)] == [4]
    assert made.succeeded(bad, "chat") is None


def test_an_announcement_ends_no_rest_and_a_new_session_has_it_tried() -> None:
    """A worker announces itself anew whenever an engine comes or goes, as one that crashes job after job does."""
    made = fleet(worker("bad", model(slots=4)), worker("good", busy=1))
    fails(made, "bad", "j1", "j2", "j3")
    made.announce(made.workers["bad"], made.workers["bad"].capabilities)
    assert made.wants(1.0) == []
    made.add(worker("bad", model(slots=4)))
    assert [want.limit for want in made.wants(1.0)] == [1]
    made.workers["bad"].pardon()
    assert [want.limit for want in made.wants(1.0)] == [4]


def test_other_models_of_it_go_on() -> None:
    made = fleet(worker("bad", model(), model("other")), worker("good", busy=1))
    fails(made, "bad", "j1", "j2", "j3")
    assert [want.model for want in made.wants(0.0)] == ["other"]


def test_the_only_one_goes_on_with_one_job_at_a_time_and_refuses_nobody() -> None:
    """A batch that fails there would keep out those whose success ends it."""
    made = fleet(worker("bad", model(slots=4)))
    assert fails(made, "bad", "j1", "j2", "j3") is not None
    for again in range(50):
        assert made.judge("llm", "chat", now=float(again)) is None
        assert [want.limit for want in made.wants(float(again))] == [1]
        fails(made, "bad", f"again{again}", now=float(again))
    assert made.succeeded(made.workers["bad"], "chat") is not None
    assert [want.limit for want in made.wants(50.0)] == [4]


def test_of_a_fleet_that_fails_job_after_job_the_last_one_goes_on() -> None:
    made = fleet(worker("bad"), worker("worse"))
    for n in range(100):
        now = float(n)
        name = next((name for name, one in made.workers.items() if one.open_to("chat", now)), None)
        assert name is not None
        fails(made, name, f"j{n}", now=now)
        assert made.judge("llm", "chat", now=now) is None


@pytest.mark.parametrize("lacks", ["labels", "kind", "memory"])
@pytest.mark.parametrize("there", [False, True])
def test_who_could_not_have_such_jobs_makes_nobody_rest(lacks: str, there: bool) -> None:
    other_kind = model(kinds=("embed",) if lacks == "kind" else ("llm",))
    room = 8.0 if lacks == "memory" else 80.0
    labels = {} if lacks == "labels" else TRUSTED
    other = (afar if there else worker)("other", other_kind)
    other.capabilities = msgspec.structs.replace(other.capabilities, labels=labels, vram_threshold_gb=room)
    made = fleet(worker("bad", labels=TRUSTED, vram_threshold_gb=80.0), *([] if there else [other]))
    made.elsewhere = lambda: [other] if there else []
    held = offered(needs=needs_of(TRUSTED, 40.0), vram_gb=40.0)
    for n in range(4):
        job = dataclasses.replace(held, job=f"j{n}", since=float(n))
        made.failed(made.workers["bad"], job, Fault("engine_failed", "It broke."), n + 0.1)
    assert made.workers["bad"].rests_from("chat", 3.1) == 0


def test_a_job_that_keeps_off_the_other_one_after_it_failed_there_makes_nobody_the_only_one() -> None:
    made = fleet(worker("bad"), worker("good"))
    for job in ("j1", "j2", "j3"):
        made.refusals.avoid(job, "good", 5.0)
    fails(made, "bad", "j1", "j2", "j3")
    assert made.workers["bad"].rests_from("chat", 0.0) == FIRST_PAUSE_S


def test_what_failed_is_counted_of_a_worker_that_was_connected_before_ten_thousand_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quarantine, "MOST_WORKERS", 4)
    made = fleet(worker("bad"), worker("good", busy=1))
    for n in range(5):
        passing = worker(f"w{n}", model("other"))
        made.add(passing)
        made.remove(passing)
    fails(made, "bad", "j1", "j2", "j3")
    assert (made.wants(0.0), made.workers["bad"].rests_from("chat", 0.0)) == ([], FIRST_PAUSE_S)


def test_a_rest_grows_while_others_take_the_model_here_or_elsewhere() -> None:
    for other_is_here in (True, False):
        made = fleet(worker("bad"), *([worker("good")] if other_is_here else []))
        if not other_is_here:
            made.elsewhere = lambda: [afar("good")]
        fails(made, "bad", "j1", "j2", "j3")
        until = made.workers["bad"].failing["chat"].until
        fails(made, "bad", "j4", now=until + 1)
        assert made.workers["bad"].failing["chat"].until == until + 1 + 2 * FIRST_PAUSE_S


def test_a_rest_is_shown_by_who_has_it_and_known_of_who_is_elsewhere() -> None:
    made = fleet(worker("bad", model(), model("other")), worker("good"))
    fails(made, "bad", "j1", "j2", "j3")
    shown, _ = made.views(5.0)
    assert shown.resting == (Resting(model="chat", for_s=FIRST_PAUSE_S - 5, failed=3, code="engine_failed"),)
    there = Fleet()
    there.elsewhere = lambda: [afar("bad", model(), model("other"), resting=shown.resting)]
    fault = there.judge("llm", "chat", now=0.0)
    assert fault is not None
    assert fault.code == "quarantined"
    assert there.judge("llm", "other", now=0.0) is None


# ---- workers of other replicas ------------------------------------------------------------------------------


def afar(name: str, *models: wire.ModelOffer, **told: Any) -> Worker:
    """A worker that is connected to another replica."""
    made = worker(name, *models)
    about: dict[str, Any] = {"accepting": True, "reason": "", "running": 0, "slots": made.slots}
    names = tuple(offer.name for offer in made.capabilities.models)
    made.view = WorkerView(**{"id": name, "models": names, **about, **told})
    return made


def test_a_cold_slot_waits_while_another_replica_has_the_model_loaded_and_idle() -> None:
    loaded = model(resident=True)
    made = fleet(worker("cold", model(slots=2)), worker("warm", loaded, model("other")))
    there = [afar("there", loaded)]
    made.elsewhere = lambda: there
    ready, cold = Want("chat", ("llm",), 1), Want("chat", ("llm",), 2, waited_ms=COLD_WAITS_MS)
    other = Want("other", ("llm",), 1)
    assert made.wants(0.0) == [ready, cold, other]
    hold(made.workers["warm"], "busy")
    assert made.wants(0.0) == [cold, other]
    there.clear()
    assert made.wants(AFAR_AGAIN_S - 0.1) == [cold, other]
    assert made.wants(AFAR_AGAIN_S) == [Want("chat", ("llm",), 2), other]


@pytest.mark.parametrize(
    "why", ["busy", "cold, too", "paused", "draining", "rests", "another model", "other labels", "connected here, too"]
)
def test_a_cold_slot_does_not_wait_for_who_would_not_take_the_job(why: str) -> None:
    rests = (Resting(model="chat", for_s=3.0),) if why == "rests" else ()
    told = model("other" if why == "another model" else "chat", resident=why != "cold, too")
    there = afar("there", told, running=int(why == "busy"), resting=rests)
    there.draining = why == "draining"
    if why == "paused":
        there.capabilities = msgspec.structs.replace(there.capabilities, accepting=False)
    name = "there" if why == "connected here, too" else "here"
    made = fleet(worker(name, labels=TRUSTED if why == "other labels" else {}))
    made.asked(frozenset(TRUSTED.items()))
    made.elsewhere = lambda: [there]
    assert [want.waited_ms for want in made.wants(0.0)] == [0]


def test_a_job_that_all_here_have_refused_may_be_for_a_worker_elsewhere() -> None:
    made = fleet(worker("small"))
    large = afar("large")
    made.elsewhere = lambda: [large]
    made.refusals.refuse("j", "small")
    assert made.refused_here(offered())
    assert not made.refused_by_all(offered())
    assert made.others(offered(), "small", 0.0)
    large.refuses = frozenset({"j"})
    assert made.refused_by_all(offered())
    assert not made.others(offered(), "small", 0.0)


def test_what_is_refused_is_asked_for_again_when_those_elsewhere_have_refused_it_or_have_gone() -> None:
    made = fleet(worker("small"))
    large = afar("large")
    there = [large]
    made.elsewhere = lambda: there
    for job in ("j1", "j2", "j3"):
        made.refuse(made.workers["small"], offered(job=job))
    assert not made.ask_again(1.0)
    assert made.wants(1.0)[0].but == ("j1", "j2", "j3")
    large.refuses = frozenset({"j2", "never heard of"})
    assert made.ask_again(1.0)
    assert not made.ask_again(1.0)  # it was
    assert made.wants(1.0)[0].but == ("j1", "j3")
    there.clear()
    assert not made.ask_again(2.0), "it may only have lost its connection"
    there.append(large)
    assert not made.ask_again(2.0 + GONE_S)
    there.clear()
    assert not made.ask_again(3.0 + GONE_S)
    assert made.ask_again(3.0 + 2 * GONE_S)
    assert made.wants(3.0 + 2 * GONE_S)[0].but == ()
    made.refusals.forget("j1")
    assert not made.ask_again(9 * GONE_S)


def test_what_others_tell_waits_while_somebody_may_come_back() -> None:
    made = fleet(worker("small"), worker("large"))
    third = afar("third")
    made.elsewhere = lambda: [third]
    made.refuse(made.workers["small"], offered(job="j"))
    assert not made.ask_again(1.0)
    made.remove(made.workers["large"])
    third.refuses = frozenset({"j"})
    assert not made.ask_again(2.0)
    made.add(worker("large"))
    assert not made.ask_again(2.0 + GONE_S), "it is back, and has not refused it"
    made.remove(made.workers["large"])
    assert not made.ask_again(3.0 + GONE_S)
    assert made.ask_again(3.0 + 2 * GONE_S)


@pytest.mark.parametrize("away", ["serves another model", "draining", "rests", "connected here, too"])
def test_who_elsewhere_cannot_have_it_is_not_waited_for(away: str) -> None:
    rests = (Resting(model="chat", for_s=3.0),) if away == "rests" else ()
    large = afar("large", model("other") if away == "serves another model" else model(), resting=rests)
    large.draining = away == "draining"
    name = "large" if away == "connected here, too" else "small"
    made = fleet(worker(name))
    made.elsewhere = lambda: [large]
    assert not made.others(offered(), name, 0.0)
