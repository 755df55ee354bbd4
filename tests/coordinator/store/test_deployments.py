"""What every store keeps of deployments; the plans are the real ones."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import msgspec
import pytest

from coordinator.deploy.plan import GRACE_MS, plan
from coordinator.deploy.spec import Asked, Deployment, Placement, model_name
from coordinator.records import Submission
from coordinator.store import Store
from coordinator.store.base import Want
from protocol.faults import Fault, FaultError, refuse
from protocol.link_wire import Capabilities, ModelOffer

HOUR_MS = 3_600_000
WILLING = Capabilities(deploys=True, labels={"room": "cellar"})


def asked(replicas: int = 1, digit: str = "a") -> Asked:
    return Asked(name="chat", source="https://models.test/chat.gguf", sha256=digit * 64, replicas=replicas)


def deploy(store: Store, wanted: Asked) -> Deployment:
    return store.deploy(wanted.name, lambda _known: wanted)


def all_ready(store: Store) -> None:
    for one in store.placements():
        if one.state != "leaving":
            assert store.placed(msgspec.structs.replace(one, state="ready"), [one.state])


def test_a_deployment_is_planned_on_the_workers_that_are_there(store: Store) -> None:
    deploy(store, asked(2))
    store.seen("a", WILLING, draining=False)
    store.seen("b", Capabilities(), draining=False)
    store.replan(plan)
    assert [(one.worker, one.state) for one in store.placements()] == [("a", "wanted")]
    store.seen("c", WILLING, draining=False)
    store.replan(plan)
    assert {one.worker for one in store.placements()} == {"a", "c"}
    assert store.candidates()["a"].capabilities == WILLING


def test_deployments_that_are_planned_together_come_to_workers_of_their_own(store: Store) -> None:
    for name in ("a", "b", "c"):
        store.seen(name, WILLING, draining=False)
    for name in ("chat", "hear", "paint"):
        deploy(store, msgspec.structs.replace(asked(), name=name))
    store.replan(plan)
    assert sorted(one.worker for one in store.placements()) == ["a", "b", "c"]


def test_nothing_is_planned_where_all_is_as_it_was_asked_for(store: Store) -> None:
    store.seen("a", WILLING, draining=False)
    assert store.standing(plan).settled
    deploy(store, asked())
    assert not store.standing(plan).settled
    store.replan(plan)
    all_ready(store)
    store.replan(plan)
    standing = store.standing(plan)
    assert standing.settled
    assert (standing.deployments, standing.placements) == (store.deployments(), store.placements())
    store.lost("a")
    store.shift_clock(HOUR_MS)
    store.beat()
    assert not store.standing(plan).settled, "there is a worker to forget"


def test_another_revision_takes_over_with_the_jobs_that_wait(store: Store) -> None:
    store.seen("a", WILLING, draining=False)
    deploy(store, asked())
    store.replan(plan)
    all_ready(store)
    [first] = store.replan(plan)
    assert first.current == asked().revision
    store.insert("job_1", Submission(kind="llm", model=model_name("chat", first.current), params=b"\x80"))
    changed = deploy(store, asked(digit="b"))
    assert changed.served == asked()
    assert changed.current == first.current
    store.replan(plan)
    assert {one.state for one in store.placements()} == {"ready", "wanted"}
    all_ready(store)
    [second] = store.replan(plan)
    assert second.current == asked(digit="b").revision
    assert second.served is None
    assert store.redirect() == 1
    job = store.get("job_1")
    assert job is not None
    assert job.model == model_name("chat", second.current)
    assert {one.state for one in store.placements()} == {"ready", "leaving"}


def flipped(store: Store, digit: str = "a") -> str:
    """Deploy it so that it answers; what its workers call it."""
    store.seen("a", WILLING, draining=False)
    deploy(store, asked(digit=digit))
    store.replan(plan)
    all_ready(store)
    store.replan(plan)
    return model_name("chat", asked(digit=digit).revision)


def wait_for(store: Store, job: str, model: str) -> None:
    store.insert(job, Submission(kind="llm", model=model, params=b"\x80"))


def model_of(store: Store, job: str) -> str:
    found = store.get(job)
    assert found is not None
    return found.model


def test_jobs_that_came_before_their_model_was_deployed_are_done(store: Store) -> None:
    wait_for(store, "job_1", "chat")
    assert store.redirect() == 0
    answers = flipped(store)
    assert store.redirect() == 1
    assert model_of(store, "job_1") == answers


def test_jobs_that_move_to_another_model_stand_among_those_that_wait_there(store: Store) -> None:
    """The tags of two models say nothing of each other."""
    new = flipped(store)
    later = store.now_ms() + 86_400_000

    def ask(job: str, tenant: str, model: str, after: int = 0) -> None:
        asked = Submission(kind="llm", model=model, params=b"\x80", tenant=tenant, run_after_ms=after)
        store.insert(job, asked)

    def serve(model: str) -> str:
        [(job, _)] = store.claim([Want(model, ("llm",), 1)])
        assert store.accept(job.id, job.attempt, "w")
        return job.id

    for n in range(30):
        ask(f"old_{n:02}", "a", "chat")
    for _ in range(20):
        serve("chat")
    ask("later", "a", "chat", later)
    for n in range(20):
        ask(f"new_{n:02}", "b", new)
    assert store.redirect() == 11
    order = [serve(new) for _ in range(20)]
    assert [name for name in order if name.startswith("old")] == [f"old_{n:02}" for n in range(20, 30)]
    assert sum(name.startswith("old") for name in order[:10]) in (4, 5, 6)
    store.shift_clock(86_400_000 + 1000)
    assert "later" in [serve(new) for _ in range(11)]


def test_jobs_that_come_by_the_old_name_after_the_new_one_answers_are_done(store: Store) -> None:
    old, new = flipped(store), flipped(store, "b")
    wait_for(store, "job_1", old)  # by a replica that has not heard yet, or back from a worker that was lost
    assert store.redirect() == 1
    assert model_of(store, "job_1") == new
    assert store.redirect() == 0


def test_a_failed_job_whose_revision_is_gone_is_tried_again_at_the_one_that_answers(store: Store) -> None:
    old = flipped(store)
    wait_for(store, "job_1", old)
    [(job, _)] = store.claim([Want(old, ("llm",), 1)])
    store.end("job_1", job.attempt, Fault("engine_failed", "It broke."))
    new = flipped(store, "b")
    store.retry("job_1", None)
    assert store.redirect() == 1
    assert model_of(store, "job_1") == new


def test_jobs_of_what_is_not_deployed_any_more_wait_for_whoever_bears_its_name(store: Store) -> None:
    old = flipped(store)
    store.undeploy("chat")
    store.replan(plan)
    for placement in store.placements():
        store.unplaced(placement)
    assert store.replan(plan) == []
    wait_for(store, "job_1", old)
    offer = ModelOffer(name=old, kinds=("llm",), engine="fake")
    store.seen("a", msgspec.structs.replace(WILLING, models=(offer,)), draining=False)
    assert store.redirect() == 0, "somebody serves it still"
    store.seen("a", WILLING, draining=False)
    assert store.redirect() == 1
    assert model_of(store, "job_1") == "chat"


def test_names_that_only_look_like_a_revision_are_somebody_elses(store: Store) -> None:
    lookalikes = ["chat@home", "chat@", "chat@ABCDEF0123", "chat@0123456789a", "chatty", "a@chat", "chat@0123456789@x"]
    for n, name in enumerate(lookalikes):
        wait_for(store, f"job_{n}", name)
    flipped(store)
    assert store.redirect() == 0
    assert [model_of(store, f"job_{n}") for n in range(len(lookalikes))] == lookalikes


def test_a_deployment_that_is_given_up_ends_with_its_last_placement(store: Store) -> None:
    store.seen("a", WILLING, draining=False)
    deploy(store, asked())
    store.replan(plan)
    all_ready(store)
    store.replan(plan)
    assert store.undeploy("chat") is not None
    assert store.undeploy("other") is None
    [left] = store.replan(plan)
    assert left.leaving
    [placement] = store.placements("a")
    assert placement.state == "leaving"
    store.unplaced(placement)
    assert store.replan(plan) == []
    assert store.deployments() == []


def leave_behind(store: Store) -> None:
    """A worker serves, goes away, and the deployment is given up."""
    flipped(store)
    store.lost("a")
    store.undeploy("chat")
    store.shift_clock(GRACE_MS)
    store.beat()
    for _ in range(2):
        left = store.replan(plan)
    assert left == [], "it is not waited for"


def test_what_a_worker_that_is_away_is_to_let_go_of_waits_for_it(store: Store) -> None:
    leave_behind(store)
    [waits] = store.placements()
    assert (waits.worker, waits.state) == ("a", "leaving")
    deploy(store, msgspec.structs.replace(asked(), name="other"))
    store.shift_clock(24 * HOUR_MS)
    store.beat()
    store.replan(plan)
    assert store.candidates() == {}
    assert store.placements() == [], "nothing to anybody who is here"
    store.seen("a", WILLING, draining=False)
    assert store.placements("a") == [waits]
    store.unplaced(waits)
    assert store.placements("a") == []


def test_who_never_came_back_is_forgotten_after_a_year(store: Store) -> None:
    leave_behind(store)
    store.shift_clock(367 * 24 * HOUR_MS)
    store.beat()
    store.replan(plan)
    store.seen("a", WILLING, draining=False)
    assert store.placements("a") == []


def test_what_was_given_up_and_is_wanted_again_stays_where_it_is(store: Store) -> None:
    leave_behind(store)
    deploy(store, asked())
    store.seen("a", WILLING, draining=False)
    store.replan(plan)
    [again] = store.placements()
    assert (again.worker, again.state) == ("a", "wanted")
    store.unplaced(again)  # of an order that was answered meanwhile
    assert store.placements() == [again]


def test_given_up_and_given_anew_it_is_another_revision_that_stays(store: Store) -> None:
    leave_behind(store)
    deploy(store, asked(digit="b"))
    store.seen("a", WILLING, draining=False)
    store.replan(plan)
    states = {one.revision: one.state for one in store.placements("a")}
    assert states == {asked().revision: "leaving", asked(digit="b").revision: "wanted"}


def test_given_up_and_given_anew_it_has_its_name_to_earn_again(store: Store) -> None:
    """Until then whoever else bears it answers, as while it was given up."""
    flipped(store)
    store.undeploy("chat")
    store.replan(plan)
    again = deploy(store, asked(digit="b"))
    assert (again.leaving, again.current, again.served) == (False, "", None)
    store.replan(plan)
    all_ready(store)
    [answers] = store.replan(plan)
    assert answers.current == asked(digit="b").revision


def test_who_writes_how_far_it_is_must_have_seen_where_it_was(store: Store) -> None:
    store.seen("a", WILLING, draining=False)
    deploy(store, asked())
    store.replan(plan)
    [one] = store.placements()
    assert store.placed(msgspec.structs.replace(one, state="fetching"), ["wanted"])
    assert not store.placed(msgspec.structs.replace(one, state="ready"), ["wanted"])
    store.undeploy("chat")
    store.replan(plan)
    assert not store.placed(msgspec.structs.replace(one, state="ready"), ["fetching"]), "it is to leave by now"
    assert not store.placed(Placement(deployment="x", revision="y", worker="z"), ["wanted"])


def test_a_lost_worker_is_replaced_after_its_grace(store: Store) -> None:
    store.seen("a", WILLING, draining=False)
    deploy(store, asked())
    store.replan(plan)
    all_ready(store)
    store.lost("a")
    store.seen("b", WILLING, draining=False)
    store.shift_clock(GRACE_MS - 10_000)
    store.beat()
    store.replan(plan)
    assert [one.worker for one in store.placements()] == ["a"]
    store.shift_clock(10_000)
    store.beat()
    store.replan(plan)
    assert {one.worker for one in store.placements()} >= {"b"}


def test_workers_of_an_earlier_life_are_away(make: Callable[[], Store]) -> None:
    store = make()
    store.seen("a", WILLING, draining=False)
    store.all_lost()
    assert not store.candidates()["a"].connected


def test_many_may_plan_at_once(store: Store) -> None:
    names = [f"w{n}" for n in range(6)]
    for name in names:
        store.seen(name, WILLING, draining=False)
    deploy(store, asked(4))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: store.replan(plan), range(12)))
    assert len(store.placements()) == 4


def test_of_two_who_ask_at_once_the_second_sees_what_the_first_made_of_it(store: Store) -> None:
    together = Barrier(8)

    def one_more(known: Deployment | None) -> Asked:
        return asked(1) if known is None else msgspec.structs.replace(known.asked, replicas=known.asked.replicas + 1)

    def ask(_: int) -> None:
        together.wait(60)
        store.deploy("chat", one_more)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))
    [made] = store.deployments()
    assert (made.asked.replicas, made.version) == (8, 8)


def test_a_wish_that_is_refused_changes_nothing(store: Store) -> None:
    deploy(store, asked(3))

    def refused(known: Deployment | None) -> Asked:
        raise refuse("invalid_parameter", "No.")

    with pytest.raises(FaultError, match=r"No\."):
        store.deploy("chat", refused)
    [made] = store.deployments()
    assert (made.asked, made.version) == (asked(3), 1)


def test_who_is_connected_here_is_written_down(make: Callable[[], Store]) -> None:
    store = make()
    for name in ("a", "b"):
        store.seen(name, WILLING, draining=False)
    store.lost("b")
    assert store.present() == {"a"}
