"""The plan of a deployment: who is chosen, who is kept, who goes, and when another revision answers."""

from __future__ import annotations

import random
from collections.abc import Mapping

import msgspec
import pytest

from coordinator.deploy.plan import GIVEN_UP_AFTER, GRACE_MS, Changes, due, plan
from coordinator.deploy.spec import Asked, Candidate, Deployment, Placement, checked, why_not
from protocol.faults import FaultError
from protocol.link_wire import Capabilities, Gpu, ModelOffer

DIGEST = "a" * 64
OTHER = "b" * 64


def asked(replicas: int = 2, sha256: str = DIGEST, **fields: object) -> Asked:
    return msgspec.convert(
        {"name": "chat", "source": "https://models.test/chat.gguf", "sha256": sha256, "replicas": replicas, **fields},
        Asked,
    )


def box(name: str, gpu: str = "NVIDIA L40S", gib: int = 48, **fields: object) -> Candidate:
    capabilities = Capabilities(
        gpus=(Gpu(uuid=f"GPU-{name}", name=gpu, vram_bytes=gib * 2**30),), deploys=True, labels={"room": name}
    )
    return msgspec.structs.replace(Candidate(worker=name, capabilities=capabilities), **fields)


def boxes(*names: str) -> dict[str, Candidate]:
    return {name: box(name) for name in names}


def at(worker: str, state: str = "ready", revision: str = "", failures: int = 0) -> Placement:
    return msgspec.convert(
        {
            "deployment": "chat",
            "revision": revision or asked().revision,
            "worker": worker,
            "state": state,
            "failures": failures,
        },
        Placement,
    )


def applied(
    deployment: Deployment, placements: list[Placement], changes: Changes
) -> tuple[Deployment, list[Placement]]:
    """What a store makes of the changes."""
    leaving = {(one.revision, one.worker) for one in changes.leave}
    again = {(one.revision, one.worker) for one in changes.add}
    kept = [
        msgspec.structs.replace(one, state="leaving") if (one.revision, one.worker) in leaving else one
        for one in placements
        if one.state != "leaving" or (one.revision, one.worker) not in again
    ]
    if changes.current is not None:
        deployment = msgspec.structs.replace(deployment, current=changes.current, served=None)
    return deployment, [*kept, *changes.add]


def test_as_many_as_wanted_are_chosen_and_no_more() -> None:
    changes = plan(Deployment(asked=asked(2)), [], boxes("a", "b", "c"))
    assert [one.worker for one in changes.add] == ["a", "b"]
    assert not changes.leave


def test_who_has_least_to_serve_is_chosen() -> None:
    there = boxes("a", "b", "c")
    there["a"] = box("a", placed=2)
    own = tuple(ModelOffer(name=name, kinds=("llm",), engine="llm") for name in ("mine", "chat@home"))
    there["b"] = box("b", capabilities=msgspec.structs.replace(there["b"].capabilities, models=own))
    there["c"] = box("c", placed=1)
    assert [one.worker for one in plan(Deployment(asked=asked(1)), [], there).add] == ["c"]


def test_fewer_workers_than_wanted_are_all_chosen() -> None:
    assert len(plan(Deployment(asked=asked(5)), [], boxes("a", "b")).add) == 2


@pytest.mark.parametrize(
    ("on", "reason"),
    [
        ({"gpu": "H100"}, "it has NVIDIA L40S, and gpu=H100 is wanted"),
        ({"gpu": "l40s"}, ""),
        ({"vram_gb": "80"}, "its largest GPU has 48 GiB, and 80 are wanted"),
        ({"vram_gb": "48"}, ""),
        ({"room": "b"}, "its label room is a"),
        ({"trusted": "true"}, "it has no label trusted"),
        ({"worker": "b"}, "worker=b is wanted"),
        ({"worker": "a"}, ""),
    ],
)
def test_a_worker_must_have_what_is_asked_for(on: Mapping[str, str], reason: str) -> None:
    assert why_not(asked(on=on), box("a")) == reason


def test_a_worker_whose_owner_does_not_allow_it_is_never_chosen() -> None:
    closed = msgspec.structs.replace(box("a"), capabilities=Capabilities(deploys=False))
    assert not plan(Deployment(asked=asked(1)), [], {"a": closed}).add
    assert "its owner does not let" in why_not(asked(), closed)


def test_too_many_let_go_and_those_that_are_ready_stay() -> None:
    placements = [at("a", "fetching"), at("b"), at("c")]
    changes = plan(Deployment(asked=asked(2), current=asked().revision), placements, boxes("a", "b", "c"))
    assert [one.worker for one in changes.leave] == ["a"]


def test_a_lost_worker_is_replaced_after_its_grace_and_goes_when_it_is_one_too_many() -> None:
    deployment = Deployment(asked=asked(1), current=asked().revision)
    there = {**boxes("b"), "a": box("a", connected=False, lost_ms=GRACE_MS - 1)}
    assert plan(deployment, [at("a")], there) == Changes()
    gone = {**boxes("b"), "a": box("a", connected=False, lost_ms=GRACE_MS)}
    changes = plan(deployment, [at("a")], gone)
    assert [one.worker for one in changes.add] == ["b"]
    back = plan(deployment, [at("a"), at("b")], boxes("a", "b"))
    assert len(back.leave) == 1


def test_a_lost_worker_is_to_let_go_once_others_serve_in_its_place() -> None:
    deployment = Deployment(asked=asked(1), current=asked().revision)
    gone = {**boxes("b"), "a": box("a", connected=False, lost_ms=GRACE_MS)}
    assert plan(deployment, [at("a"), at("b", "fetching")], gone) == Changes(), "it may come back as the only one"
    assert plan(deployment, [at("a"), at("b", "fetching")], boxes("a", "b")).leave == (at("b", "fetching"),)
    assert plan(deployment, [at("a"), at("b")], gone).leave == (at("a"),)
    away = {**boxes("b"), "a": box("a", connected=False, lost_ms=1)}
    assert plan(deployment, [at("a"), at("b")], away).leave == (at("a"),), "of two that serve, the one that is here"


def test_those_that_are_away_neither_answer_nor_are_waited_for() -> None:
    old, new = asked(2), asked(2, OTHER)
    deployment = Deployment(asked=new, current=old.revision, served=old)
    placements = [at("a"), at("b"), at("b", "ready", new.revision)]
    away = {**boxes("b"), "a": box("a", connected=False, lost_ms=GRACE_MS)}
    assert plan(deployment, placements, away).current == new.revision, "only b has the old one to give up"
    away["b"] = box("b", connected=False, lost_ms=1)
    assert plan(deployment, placements, away).current is None


def test_one_that_is_to_let_go_of_what_is_wanted_again_is_chosen_first() -> None:
    deployment = Deployment(asked=asked(1), current=asked().revision)
    placements = [at("b", "leaving"), at("c", "leaving", asked(1, OTHER).revision)]
    [again] = plan(deployment, placements, boxes("a", "b", "c")).add
    assert (again.worker, again.state, again.revision) == ("b", "wanted", asked().revision)
    assert not plan(deployment, placements, {"b": box("b", connected=False)}).add


def test_one_that_fails_again_and_again_keeps_its_reason_and_another_is_chosen() -> None:
    placements = [at("a", "failed", failures=GIVEN_UP_AFTER)]
    changes = plan(Deployment(asked=asked(1)), placements, boxes("a", "b"))
    assert [one.worker for one in changes.add] == ["b"]
    assert not changes.leave


def test_the_old_revision_serves_until_the_new_one_is_ready_on_as_many() -> None:
    old, new = asked(2), asked(2, OTHER)
    deployment = Deployment(asked=new, current=old.revision, served=old)
    placements = [at("a"), at("b")]
    workers = boxes("a", "b", "c")
    changes = plan(deployment, placements, workers)
    assert {one.worker for one in changes.add} == {"a", "b"}, "those that serve it already come first"
    assert not changes.leave
    assert changes.current is None
    half = [*placements, at("a", "ready", new.revision), at("b", "fetching", new.revision)]
    assert plan(deployment, half, workers) == Changes()
    whole = [*placements, at("a", "ready", new.revision), at("b", "ready", new.revision)]
    changes = plan(deployment, whole, workers)
    assert changes.current == new.revision
    assert {(one.worker, one.revision) for one in changes.leave} == {("a", old.revision), ("b", old.revision)}


def test_what_is_given_up_goes_from_everywhere() -> None:
    deployment = Deployment(asked=asked(0), current=asked().revision, leaving=True)
    changes = plan(deployment, [at("a"), at("b", "failed")], boxes("a", "b"))
    assert {one.worker for one in changes.leave} == {"a", "b"}


def test_a_worker_that_never_comes_back_is_not_waited_for() -> None:
    deployment = Deployment(asked=asked(0), leaving=True)
    assert plan(deployment, [at("a", "leaving")], {}) == Changes(over=True)
    assert plan(deployment, [at("a", "leaving")], boxes("a")) == Changes()
    assert plan(deployment, [], {}) == Changes(over=True)
    assert plan(deployment, [at("a")], {}) == Changes(leave=(at("a"),))


def test_a_pause_before_another_try_grows_and_ends() -> None:
    first, later = at("a", "failed", failures=1), at("a", "failed", failures=40)
    assert not due(first, 14_999)
    assert due(first, 15_000)
    assert not due(later, 15 * 60_000 - 1)
    assert due(later, 15 * 60_000)
    assert due(at("a", "wanted"), 0)
    assert due(at("a", "leaving"), 0)
    assert not due(at("a", "ready"), 10**9)
    assert not due(at("a", "fetching"), 10**9)


@pytest.mark.parametrize("seed", range(60))
def test_whatever_happens_it_comes_to_what_was_asked_and_stays_there(seed: int) -> None:
    """Workers come, go, fail and lie; then they are all well: as many as wanted serve, and nothing moves any more."""
    dice = random.Random(seed)
    names = [f"w{n}" for n in range(dice.randint(1, 8))]
    workers = boxes(*names)
    deployment, placements = Deployment(asked=asked(dice.randint(0, 6))), list[Placement]()
    for _ in range(40):
        one = dice.choice(names)
        workers[one] = box(one, connected=dice.random() < 0.7, lost_ms=dice.choice([0, 1, GRACE_MS]))
        if dice.random() < 0.15:
            again = asked(dice.randint(0, 6), dice.choice([DIGEST, OTHER]))
            served = deployment.of(deployment.current)
            deployment = msgspec.structs.replace(deployment, asked=again, served=served)
        deployment, placements = applied(deployment, placements, plan(deployment, placements, workers))
        placements = [_went(one, dice) for one in placements if one.state != "leaving" or dice.random() < 0.5]
        keys = [(one.revision, one.worker) for one in placements]
        assert len(keys) == len(set(keys)), f"seed {seed}: a worker has a revision twice"
    workers = boxes(*names)
    placements = [msgspec.structs.replace(one, failures=0) for one in placements]
    for _ in range(12):
        deployment, placements = applied(deployment, placements, plan(deployment, placements, workers))
        placements = [
            msgspec.structs.replace(one, state="ready", failures=0) for one in placements if one.state != "leaving"
        ]
    serving = [one for one in placements if one.revision == deployment.asked.revision]
    assert len(serving) == min(len(names), deployment.asked.replicas), f"seed {seed}"
    assert plan(deployment, placements, workers) == Changes(), f"seed {seed}: it does not come to rest"


def _went(placement: Placement, dice: random.Random) -> Placement:
    match placement.state:
        case "wanted" | "failed":
            state = dice.choice(["fetching", placement.state])
        case "fetching":
            state = dice.choice(["ready", "failed", "fetching"])
        case "ready":
            state = dice.choice(["ready", "ready", "failed"])
        case other:
            state = other
    failed = state == "failed" and placement.state != "failed"
    failures = placement.failures + failed if state != "ready" else 0
    return msgspec.convert({**msgspec.to_builtins(placement), "state": state, "failures": failures}, Placement)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"source": "http://models.test/a.gguf"}, "source"),
        ({"source": "/models/a.gguf"}, "source"),
        ({"source": "file:///etc/passwd"}, "source"),
        ({"source": "chat.gguf"}, "source"),
        ({"sha256": "", "source": "owner/repo"}, "sha256"),
        ({"sha256": "", "source": "owner/repo@main"}, "sha256"),
        ({"on": {"vram_gb": "much"}}, "vram_gb"),
        ({"on": {"vram_gb": "nan"}}, "vram_gb"),
    ],
)
def test_what_cannot_be_deployed_is_said_at_once(fields: dict[str, object], word: str) -> None:
    plain = {"name": "chat", "source": "https://models.test/a.gguf", "sha256": DIGEST, **fields}
    with pytest.raises(FaultError, match=word):
        checked(msgspec.convert(plain, Asked))


def test_a_repository_at_a_commit_needs_no_digest() -> None:
    assert checked(asked(sha256="", source=f"owner/repo@{'0' * 40}"))


def test_a_revision_is_the_bytes_and_how_they_are_loaded() -> None:
    assert asked(1).revision == asked(5).revision
    assert asked(sha256=OTHER).revision != asked().revision
    assert asked(options={"n_ctx": 4096}).revision != asked().revision
