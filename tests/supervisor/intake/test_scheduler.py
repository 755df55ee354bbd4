"""Events in, effects out: tables of situations, and invariants under any order of events."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor.intake import effects as fx
from supervisor.intake.scheduler import Scheduler
from supervisor.intake.turns import PATIENCE_S, SLICES

GIB = 2**30


def model(name: str, size: float, **more: object) -> fx.ModelPlan:
    return fx.ModelPlan(name=name, need_bytes=int(size * GIB), **{"load_s": 10.0, **more})


def gpu(uuid: str, size: float, **more: object) -> fx.DevicePlan:
    return fx.DevicePlan(uuid=uuid, total_bytes=int(size * GIB), **more)


class Drive:
    """A scheduler and what the host would know: who is loaded, who runs, what is held where."""

    def __init__(self, models, gpus, **more: object) -> None:
        self.scheduler = Scheduler(models, gpus, **more)
        self.plans = {plan.name: plan for plan in models}
        self.total = {plan.uuid: plan.total_bytes for plan in gpus}
        self.foreign = dict.fromkeys(self.total, 0)
        self.now, self.jobs = 0.0, 0
        self.loading: dict[int, fx.Load] = {}
        self.ready: dict[int, fx.Load] = {}
        self.leaving: dict[int, fx.Load] = {}
        self.running: dict[str, int] = {}
        self.waiting: set[str] = set()
        self.started: list[str] = []
        self.refused: dict[str, fx.Refuse] = {}
        self.said: list[str] = []
        self.cordoned: set[str] = set()
        self.gone_models: set[str] = set()

    def tell(self, event: fx.Event) -> list[fx.Effect]:
        match event:
            case fx.HoldPut(uuid):
                self.cordoned.add(uuid)
            case fx.HoldLifted(uuid):
                # "" lifts the hold of the whole box, and with it those of all devices.
                self.cordoned = self.cordoned - {uuid} if uuid else set()
        effects = self.scheduler.step(event, self.now)
        for effect in effects:
            self.carry_out(effect)
        return effects

    def carry_out(self, effect: fx.Effect) -> None:
        match effect:
            case fx.StartRun(number, job):
                assert number in self.ready, "a run on an instance that is not loaded"
                assert sum(one == number for one in self.running.values()) < self.slots(number)
                self.waiting.remove(job.id)
                self.running[job.id] = number
                self.started.append(job.id)
            case fx.Load(number, name, shares):
                self.loading[number] = effect
                for uuid in shares:
                    assert self.held(uuid) + self.foreign[uuid] <= self.total[uuid], f"{name} exceeds {uuid}"
                live = [*self.loading.values(), *self.ready.values()]
                serving = [
                    number
                    for number, each in {**self.loading, **self.ready}.items()
                    if each.model == name and not self.cordoned & {"", *each.shares} and not self.drains(number)
                ]
                assert len(serving) <= self.plans[name].copies
                group = self.plans[name].group
                everybody = [*live, *self.leaving.values()]
                assert not group or {one.model for one in everybody if self.plans[one.model].group == group} == {name}
            case fx.Evict(number):
                assert number not in self.running.values(), "ended while it works"
                self.leaving[number] = self.ready.pop(number)
            case fx.CancelLoad(number):
                self.leaving[number] = self.loading.pop(number)
            case fx.Refuse(job):
                self.waiting.remove(job)
                self.refused[job] = effect
            case fx.Waits(_, reason):
                assert reason
                self.said.append(reason)
            case fx.ModelGone(name):
                everybody = [*self.loading.values(), *self.ready.values(), *self.leaving.values()]
                assert name not in {one.model for one in everybody}
                self.gone_models.add(name)

    def drains(self, number: int) -> bool:
        return self.scheduler.loaded()[number][1] == "draining"

    def slots(self, number: int) -> int:
        return self.plans[self.ready[number].model].slots

    def held(self, uuid: str) -> int:
        everybody = [*self.loading.values(), *self.ready.values(), *self.leaving.values()]
        return sum(each.shares.get(uuid, 0) for each in everybody)

    def job(self, name: str, **more: object) -> str:
        self.jobs += 1
        self.waiting.add(str(self.jobs))
        self.tell(fx.Arrives(fx.Job(id=str(self.jobs), model=name, at=self.now, **more)))
        return str(self.jobs)

    def cancel(self, job: str) -> None:
        self.waiting.discard(job)
        self.tell(fx.Cancelled(job))

    def end(self, job: str) -> None:
        self.tell(fx.RunEnds(self.running.pop(job), 1.0))

    def loaded(self, number: int, problem: str = "") -> None:
        load = self.loading.pop(number)
        (self.leaving if problem else self.ready)[number] = load
        self.tell(fx.LoadEnds(number, 10.0, problem))

    def gone(self, number: int) -> None:
        del self.leaving[number]
        self.tell(fx.Gone(number))

    def wait(self, seconds: float) -> None:
        until = self.now + seconds
        while (due := self.scheduler.due()) is not None and due <= until:
            self.now = max(self.now, due)
            self.tell(fx.Tick())
        self.now = until

    def settle(self) -> None:
        """Loads and ends take no time; runs go on."""
        while self.loading or self.leaving:
            for number in list(self.loading):
                self.loaded(number)
            for number in list(self.leaving):
                self.gone(number)

    def finish(self, bound_s: float) -> None:
        """Everything that waits gets its turn within the bound."""
        until = self.now + bound_s
        while self.waiting or self.running:
            assert self.now < until, f"starved: {self.scheduler.why()}"
            self.settle()
            for job in list(self.running):
                self.end(job)
            self.settle()
            self.wait(1.0)

    def models(self) -> set[str]:
        return {load.model for load in self.ready.values()}


def test_a_job_loads_its_model_and_the_next_one_runs_at_once():
    drive = Drive([model("a", 5, slots=2)], [gpu("g", 24)])
    drive.job("a")
    assert [load.shares for load in drive.loading.values()] == [{"g": 5 * GIB}]
    drive.job("a")
    assert len(drive.loading) == 1
    drive.settle()
    assert drive.started == ["1", "2"]
    drive.job("a")
    assert drive.scheduler.why() == {"a": "its 2 slots are busy"}
    drive.end("1")
    assert drive.started[-1] == "3"


def test_a_load_blocks_nobody_else():
    drive = Drive([model("a", 5), model("b", 5)], [gpu("g", 24)])
    drive.job("b")
    drive.settle()
    drive.end("1")
    drive.job("a")
    drive.job("b")
    assert drive.started == ["1", "3"]


@pytest.mark.parametrize(
    ("name", "more", "code"),
    [
        ("nobody", {}, "unknown_model"),
        ("giant", {}, "never_fits"),
        ("a", {"vram_bytes": 13 * GIB}, "too_large"),
        ("a", {"vram_bytes": 12 * GIB}, None),
    ],
)
def test_what_is_refused(name, more, code):
    drive = Drive([model("a", 5), model("giant", 30)], [gpu("g", 24)], threshold_bytes=12 * GIB)
    job = drive.job(name, **more)
    assert (drive.refused[job].code if code else None) == code
    assert (job in drive.waiting) == (code is None)


def test_no_gpu_is_a_value():
    drive = Drive([model("a", 5), model("cpu", 0)], [])
    drive.job("a")  # with nothing known, nothing is held back
    drive.job("cpu")
    drive.settle()
    assert drive.started == ["1", "2"]
    assert all(not each.shares for each in drive.ready.values())


def test_a_queue_may_be_bounded():
    drive = Drive([model("a", 5)], [gpu("g", 24)], most_waiting=2)
    jobs = [drive.job("a") for _ in range(3)]
    assert drive.refused[jobs[2]].code == "busy"


def test_an_idle_model_makes_room_at_once():
    drive = Drive([model("a", 20), model("b", 20)], [gpu("g", 24)])
    drive.job("a")
    drive.settle()
    drive.end("1")
    drive.now += 3600
    drive.job("b")
    assert list(drive.leaving)
    drive.settle()
    assert drive.started == ["1", "2"]
    assert drive.models() == {"b"}


def test_a_busy_model_keeps_its_slice_and_the_newcomer_its_turn():
    drive = Drive([model("a", 20, slots=1), model("b", 20)], [gpu("g", 24)])
    jobs = [drive.job("a") for _ in range(400)]
    drive.settle()
    drive.wait(1.0)
    newcomer = drive.job("b")
    came = drive.now
    for job in jobs:
        drive.end(job)
        drive.wait(1.0)
        drive.settle()
        if newcomer in drive.started:
            break
    assert 30 < drive.now - came <= max(PATIENCE_S, SLICES * 22) + 10
    drive.end(newcomer)
    drive.finish(2000)


def test_pinned_models_stay():
    drive = Drive([model("a", 20, pin=True), model("b", 20)], [gpu("g", 24)])
    drive.job("a")
    drive.settle()
    drive.end("1")
    drive.job("b")
    drive.wait(1000)
    assert drive.models() == {"a"}
    assert "pinned" in drive.scheduler.why()["b"]


def test_whose_turn_it_is_is_told_to_those_behind():
    drive = Drive([model("a", 20), model("b", 20), model("c", 20)], [gpu("g", 24)])
    drive.job("a")
    drive.settle()
    drive.end("1")
    drive.job("b")
    drive.wait(1)
    assert drive.leaving, "a is ending, and its place is b's"
    drive.job("c")
    assert drive.scheduler.why()["c"] == "waits for 20.0 GiB on g: b is next there"


def test_what_its_owner_unloads_ends_after_its_last_run_and_stays_away():
    drive = Drive([model("a", 5, pin=True), model("b", 5, copies=2)], [gpu("g", 24)])
    drive.tell(fx.Wanted("a"))
    drive.job("a")
    drive.settle()
    drive.tell(fx.Unload("a", "its owner says so"))
    assert drive.models() == {"a"}, "a run is not ended for it"
    drive.end("1")
    drive.settle()
    drive.wait(1000)
    assert drive.models() == set(), "nor does a pin bring it back"
    drive.job("a")
    drive.settle()
    assert drive.started == ["1", "2"]


def test_a_load_that_its_owner_orders_ends_models_without_work():
    drive = Drive([model("a", 15), model("b", 15), model("c", 15, pin=True)], [gpu("g", 24)])
    drive.job("a")
    drive.settle()
    drive.tell(fx.Wanted("b"))
    drive.tell(fx.Wanted("b", ordered=True))
    drive.wait(100)
    assert drive.models() == {"a"}, "a run is not ended for it, nor does it wait for one"
    assert drive.scheduler.why()["b"] == "waits until the models that hold the memory have no work"
    drive.end("1")
    drive.wait(10)
    drive.settle()
    assert drive.models() == {"b"}
    drive.tell(fx.Wanted("a"))
    drive.wait(1000)
    assert drive.models() == {"b"}, "what only a preload wants ends nobody"
    drive.tell(fx.Unload("a", "not any more"))
    drive.tell(fx.Unload("b", "its owner says so"))
    drive.settle()
    drive.tell(fx.Wanted("c", ordered=True))
    drive.wait(10)
    drive.settle()
    drive.tell(fx.Wanted("a", ordered=True))
    drive.wait(100)
    assert drive.models() == {"c"}, "a pinned model stays"
    drive.tell(fx.Unload("a", "not any more"))
    assert "a" not in drive.scheduler.why(), "an order is taken back"


def test_one_of_a_group_makes_room_for_another_that_its_owner_orders():
    drive = Drive([model("a", 5, group="art"), model("b", 5, group="art")], [gpu("g", 24)])
    for name in ("a", "b"):
        drive.tell(fx.Wanted(name, ordered=True))
        drive.wait(10)
        drive.settle()
        assert drive.models() == {name}


def test_how_long_models_are_kept_and_what_jobs_may_need_changes_while_it_runs():
    drive = Drive([model("a", 5), model("b", 5)], [gpu("g", 24)])
    for job, name in (("1", "a"), ("2", "b")):
        drive.job(name)
        drive.settle()
        drive.end(job)
    drive.wait(100)
    assert drive.models() == {"a", "b"}
    drive.tell(fx.Tuned(2 * GIB, {"a": 130, "b": 200}))
    drive.wait(20)
    assert drive.models() == {"a", "b"}, "it counts from when they became idle"
    drive.wait(20)
    drive.settle()
    assert drive.models() == {"b"}
    drive.tell(fx.Tuned(2 * GIB, {"a": 130, "b": 0}))
    drive.wait(1000)
    assert drive.models() == {"b"}, "0 keeps it"
    refused = drive.job("b", vram_bytes=3 * GIB)
    assert "2.0 GiB" in drive.refused[refused].reason
    drive.tell(fx.Tuned(0, {}))
    drive.job("b", vram_bytes=3 * GIB)
    drive.settle()
    assert drive.started[-1] == "4"


def test_a_restart_ends_every_copy_and_loads_anew():
    drive = Drive([model("a", 5, copies=2, load_s=0.1)], [gpu("g", 12), gpu("h", 12)])
    for _ in range(9):
        drive.job("a")
    drive.settle()
    drive.end("1")  # runs take a second, loads less
    drive.wait(10)
    drive.settle()
    assert len(drive.ready) == 2
    before = set(drive.ready)
    drive.tell(fx.Unload("a", "a new version", again=True))
    drive.finish(100)
    drive.wait(10)
    drive.settle()
    assert drive.models() == {"a"}
    assert not before & set(drive.ready)


def test_what_is_being_unloaded_is_not_kept_for_a_swap_that_is_given_up():
    drive = Drive([model("a", 20), model("b", 20)], [gpu("g", 24)])
    drive.job("a")
    drive.settle()
    drive.now += 1000
    rare = drive.job("b")
    drive.wait(200)
    drive.tell(fx.Unload("a", "its owner says so"))
    drive.cancel(rare)
    drive.end("1")
    drive.settle()
    assert drive.models() == set()


def test_one_of_a_group_is_loaded():
    drive = Drive([model("a", 2, group="x"), model("b", 2, group="x")], [gpu("g", 24)])
    drive.job("a")
    drive.settle()
    drive.end("1")
    drive.now += 3600
    drive.job("b")
    drive.settle()
    assert drive.models() == {"b"}


def test_a_load_nobody_waits_for_is_cancelled():
    drive = Drive([model("a", 5), model("p", 5, pin=True)], [gpu("g", 24)])
    drive.cancel(drive.job("a"))
    assert [load.model for load in drive.leaving.values()] == ["a"]
    drive.cancel(drive.job("p"))
    assert [load.model for load in drive.loading.values()] == ["p"]


def test_a_place_is_given_up_when_its_job_is_cancelled():
    drive = Drive([model("a", 20), model("b", 20)], [gpu("g", 24)])
    drive.job("a")
    drive.settle()
    drive.now += 1000
    rare = drive.job("b")
    drive.wait(200)
    assert drive.scheduler.loaded() == {1: ("a", "draining")}
    drive.cancel(rare)
    assert drive.scheduler.loaded() == {1: ("a", "ready")}
    drive.end("1")
    drive.job("a")
    assert drive.started[-1] == "3"


def test_a_failed_load_answers_those_who_wait():
    drive = Drive([model("a", 5)], [gpu("g", 24)])
    jobs = [drive.job("a"), drive.job("a")]
    drive.loaded(1, "the file is broken")
    assert {drive.refused[job].code for job in jobs} == {"load_failed"}
    assert "the file is broken" in drive.refused["1"].reason
    drive.gone(1)
    drive.job("a")
    drive.settle()
    assert drive.started == ["3"]


def test_keep_alive_ends_an_idle_model():
    drive = Drive([model("a", 5, keep_alive_s=60.0)], [gpu("g", 24)])
    drive.job("a")
    drive.settle()
    drive.end("1")
    drive.wait(50)
    drive.end(drive.job("a"))
    drive.wait(59)
    assert drive.models() == {"a"}
    drive.wait(2)
    assert list(drive.leaving) == [1]


def test_memory_of_other_programs_counts():
    drive = Drive([model("a", 20)], [gpu("g", 24)])
    drive.foreign["g"] = 10 * GIB
    drive.tell(fx.Reading("g", 10 * GIB))
    drive.job("a")
    drive.wait(100)
    assert not drive.loading
    assert "other programs" in drive.scheduler.why()["a"]
    drive.foreign["g"] = 0
    drive.tell(fx.Reading("g", 0))
    assert drive.loading


def test_what_was_learned_moves_a_model():
    drive = Drive([model("a", 20, estimated=True)], [gpu("small", 16), gpu("large", 48)])
    drive.tell(fx.Learned("a", 10 * GIB))
    drive.job("a")
    assert [list(load.shares) for load in drive.loading.values()] == [["small"]]


def test_a_hold_stops_and_unloads_and_its_end_resumes():
    drive = Drive([model("a", 5)], [gpu("g", 24)])
    running = drive.job("a")
    drive.settle()
    drive.tell(fx.HoldPut("g", "held by the operator (a game)", unload=True))
    waits = drive.job("a")
    assert drive.running
    drive.end(running)
    assert list(drive.leaving) == [1]
    drive.settle()
    drive.wait(100)
    assert not drive.loading
    assert drive.scheduler.why() == {"a": "held by the operator (a game)"}
    drive.tell(fx.HoldLifted("g"))
    drive.settle()
    assert drive.started[-1] == waits


def test_a_cordoned_gpu_sends_its_work_to_another():
    drive = Drive([model("a", 5)], [gpu("g", 24), gpu("h", 24)])
    drive.job("a")
    drive.settle()
    drive.end("1")
    [first] = drive.ready.values()
    drive.tell(fx.HoldPut(next(iter(first.shares)), "cordoned"))
    drive.job("a")
    drive.settle()
    assert {next(iter(load.shares)) for load in drive.ready.values()} == {"g", "h"}
    drive.end("2")
    drive.tell(fx.HoldLifted(next(iter(first.shares))))
    drive.settle()
    assert len(drive.ready) == 1  # one copy is what it may have


def test_a_model_whose_hold_ends_needs_no_other_place():
    """It was cordoned while it loaded, and a place elsewhere was being cleared for it."""
    drive = Drive([model("a", 4), model("b", 20)], [gpu("g", 24), gpu("h", 24)])
    drive.job("a")
    drive.job("b")
    [first] = drive.loading[1].shares
    [other] = drive.loading[2].shares
    drive.loaded(2, "broken")
    drive.foreign[other] = GIB
    drive.tell(fx.Reading(other, GIB))
    drive.tell(fx.HoldPut(first, "cordoned"))
    drive.tell(fx.HoldLifted(first))
    drive.settle()
    assert sorted(drive.ready) == [1]


def test_a_large_model_is_split_when_its_engine_can():
    drive = Drive([model("a", 40, split=True)], [gpu("g", 24), gpu("h", 24)])
    drive.job("a")
    [load] = drive.loading.values()
    assert set(load.shares) == {"g", "h"}


def test_a_hot_model_gets_copies():
    drive = Drive([model("a", 20, copies=3)], [gpu(name, 24) for name in "ghi"])
    for _ in range(100):
        drive.job("a")
    for _ in range(40):
        drive.settle()
        for job in list(drive.running):
            drive.end(job)
        drive.wait(1.0)
    assert len(drive.ready) == 3
    drive.finish(1000)


def test_what_is_not_known_changes_nothing():
    drive = Drive([model("a", 5)], [gpu("g", 24)])
    for event in (fx.RunEnds(9), fx.LoadEnds(9), fx.Gone(9), fx.Cancelled("9"), fx.Reading("x", 5), fx.Learned("x", 5)):
        assert drive.tell(event) == []


MODELS = [
    model("small", 4, slots=2),
    model("copies", 8, copies=2),
    model("large", 20),
    model("one", 6, group="x"),
    model("other", 6, group="x", keep_alive_s=30.0),
    model("split", 34, split=True),
    model("pinned", 3, pin=True),
]
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("job"), st.integers(0, len(MODELS) - 1), st.integers(0, 1)),
        st.tuples(st.sampled_from(["end", "load", "fail", "gone", "cancel"]), st.integers(0, 9), st.just(0)),
        st.tuples(st.sampled_from(["hold", "lift", "unload"]), st.integers(0, 2), st.just(0)),
        st.tuples(st.sampled_from(["dismiss", "part", "join"]), st.integers(0, len(MODELS) - 1), st.just(0)),
        st.tuples(st.just("foreign"), st.integers(0, 1), st.integers(0, 12)),
        st.tuples(st.just("wait"), st.sampled_from([1, 10, 150]), st.just(0)),
    ),
    max_size=60,
)


def play(drive: Drive, what: str, which: int, more: int) -> None:
    def pick(items):
        listed = sorted(items)
        return listed[which % len(listed)] if listed else None

    places = ("g", "h", "")
    if what == "job":
        drive.job(MODELS[which].name, priority=more)
    elif what == "end" and (job := pick(drive.running)) is not None:
        drive.end(job)
    elif what in ("load", "fail") and (number := pick(drive.loading)) is not None:
        drive.loaded(number, "broken" if what == "fail" else "")
    elif what == "gone" and (number := pick(drive.leaving)) is not None:
        drive.gone(number)
    elif what == "cancel" and (job := pick(drive.waiting)) is not None:
        drive.cancel(job)
    elif what == "dismiss":
        drive.tell(fx.Unload(MODELS[which].name, "its owner says so"))
    elif what == "part":
        drive.tell(fx.ModelParts(MODELS[which].name, "its owner says so"))
    elif what == "join" and MODELS[which].name in drive.gone_models:
        drive.gone_models.discard(MODELS[which].name)
        drive.tell(fx.ModelJoins(MODELS[which]))
    elif what in ("hold", "unload"):
        drive.tell(fx.HoldPut(places[which], "a reason", unload=what == "unload"))
    elif what == "lift":
        drive.tell(fx.HoldLifted(places[which]))
    elif what == "foreign":
        uuid = places[which]
        drive.foreign[uuid] = min(more * GIB, drive.total[uuid] - drive.held(uuid))
        drive.tell(fx.Reading(uuid, drive.foreign[uuid]))
    elif what == "wait":
        drive.wait(which)


@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_whatever_happens_the_promises_hold(steps):
    """Never more on a GPU than it has, no slot twice, every job once, never a wait without a word, nobody starves."""
    drive = Drive(MODELS, [gpu("g", 24), gpu("h", 24)])
    for step in steps:
        play(drive, *step)
        why = drive.scheduler.why()
        assert all(why.values())
        assert bool(why) == bool(drive.waiting)
    for uuid in ("g", "h"):
        drive.foreign[uuid] = 0
        drive.tell(fx.Reading(uuid, 0))
    for uuid in ("", "g", "h"):
        drive.tell(fx.HoldLifted(uuid))
    drive.finish(PATIENCE_S + 20 * SLICES * 22)
    assert len(drive.started) == len(set(drive.started))


# ---- models that come and go


def test_a_model_that_joins_is_served_like_any_other():
    drive = Drive([model("a", 5)], [gpu("g", 24)])
    unknown = drive.job("b")
    assert drive.refused[unknown].code == "unknown_model"
    drive.plans["b"] = model("b", 20)
    drive.tell(fx.ModelJoins(drive.plans["b"]))
    first, second = drive.job("a"), drive.job("b")
    drive.finish(100)
    assert {first, second} <= set(drive.started)
    with pytest.raises(ValueError, match="'b' already"):
        drive.tell(fx.ModelJoins(drive.plans["b"]))


def test_a_model_that_parts_refuses_who_waits_and_goes_after_its_last_run():
    drive = Drive([model("a", 5, pin=True, group="x"), model("b", 5, group="x")], [gpu("g", 24)])
    runs, waits = drive.job("a"), drive.job("a")
    drive.wait(1)
    (number,) = drive.loading
    drive.loaded(number)
    drive.tell(fx.ModelParts("a", "its owner says so"))
    drive.tell(fx.ModelParts("a", "twice"))
    assert (drive.refused[waits].code, drive.gone_models) == ("parted", set())
    assert drive.refused[drive.job("a")].code == "unknown_model"
    for event in (
        fx.Copies("a", 3),
        fx.Wanted("a", ordered=True),
        fx.Unload("a", "anew", again=True),
        fx.Unread("a"),
        fx.Learned("a", 7),
        fx.Tuned(0, {"a": 5.0}),
    ):
        drive.tell(event)
    drive.end(runs)
    assert (number in drive.leaving, drive.gone_models) == (True, set())
    drive.gone(number)
    assert drive.gone_models == {"a"}
    assert (drive.scheduler.waits_of("a"), drive.scheduler.most_of("a")) == ("", 0)
    drive.tell(fx.ModelJoins(drive.plans["a"]))
    assert drive.job("b")
    drive.finish(100)
    assert drive.started[0] == runs


@pytest.mark.parametrize("stage", ["never loaded", "loading"])
def test_a_model_that_parts_before_it_is_loaded_is_gone_at_once_or_when_its_load_ended(stage):
    drive = Drive([model("a", 5)], [gpu("g", 24)])
    if stage == "loading":
        drive.job("a")
        drive.wait(1)
    drive.tell(fx.ModelParts("a", "its owner says so"))
    assert bool(drive.leaving) == (stage == "loading")
    for number in list(drive.leaving):
        drive.gone(number)
    assert drive.gone_models == {"a"}
    assert drive.scheduler.due() is None
    assert drive.waiting == set()


# ---- what only a running supervisor tells


def test_of_an_exclusive_group_a_busy_model_does_not_load_again_while_another_takes_its_turn():
    drive = Drive([model("a", 5, group="g"), model("b", 5, group="g")], [gpu("g0", 24), gpu("g1", 24)])
    running = drive.job("a")
    drive.settle()
    drive.job("b")
    drive.now += PATIENCE_S + 1
    drive.tell(fx.Tick())
    assert drive.drains(drive.running[running])
    drive.job("a")
    drive.now += 10
    drive.tell(fx.Tick())
    assert not drive.loading  # there is room for it on the other GPU, and it is b's turn
    drive.end(running)
    drive.gone(next(iter(drive.leaving)))
    assert [load.model for load in drive.loading.values()] == ["b"]


def test_a_job_that_wants_to_be_alone_waits_for_an_empty_instance_and_holds_up_those_behind_it():
    drive = Drive([model("a", 5, slots=3)], [gpu("g", 24)])
    first = drive.job("a")
    drive.settle()
    alone, behind = drive.job("a", alone=True), drive.job("a")
    assert drive.started == [first]
    drive.end(first)
    assert drive.started == [first, alone]
    drive.end(alone)
    assert drive.started == [first, alone, behind]


def test_a_cancelled_job_that_wanted_to_be_alone_lets_the_others_in():
    drive = Drive([model("a", 5, slots=3)], [gpu("g", 24)])
    drive.job("a")
    drive.settle()
    alone, behind = drive.job("a", alone=True), drive.job("a")
    drive.cancel(alone)
    assert behind in drive.running


def test_an_instance_that_does_not_accept_gets_no_runs_until_it_does():
    drive = Drive([model("a", 5, slots=3)], [gpu("g", 24)])
    drive.job("a")
    drive.settle()
    (number,) = drive.ready
    drive.tell(fx.Accepts(number, False))
    job = drive.job("a")
    assert job in drive.waiting
    drive.tell(fx.Accepts(number, True))
    assert job in drive.running


def test_an_instance_that_breaks_is_replaced_when_it_is_gone():
    drive = Drive([model("a", 5)], [gpu("g", 24)])
    job = drive.job("a")
    drive.settle()
    (number,) = drive.ready
    drive.leaving[number] = drive.ready.pop(number)
    drive.tell(fx.Leaves(number))
    drive.end(job)
    drive.job("a")
    drive.now += 10
    drive.tell(fx.Tick())
    assert not drive.loading  # its lane is still busy with the end
    drive.gone(number)
    assert len(drive.loading) == 1


def test_how_many_runs_an_instance_takes_is_what_it_says():
    drive = Drive([model("a", 5)], [gpu("g", 24)])
    drive.job("a")
    (number,) = drive.loading
    drive.ready[number] = drive.loading.pop(number)
    drive.plans["a"] = model("a", 5, slots=4)
    drive.tell(fx.LoadEnds(number, 1.0, slots=4))
    for _ in range(4):
        drive.job("a")
    assert (len(drive.running), len(drive.waiting)) == (4, 1)


def test_without_a_lane_jobs_wait_or_are_refused_when_there_is_a_reason():
    drive = Drive([model("a", 5)], [gpu("g", 24)])
    drive.tell(fx.Copies("a", 0))
    job = drive.job("a")
    assert job in drive.waiting
    assert "after a pause" in drive.scheduler.why()["a"]
    drive.tell(fx.Copies("a", 0, "it crashes"))
    assert drive.refused[job].code == "quarantined"
    drive.tell(fx.Copies("a", 1))
    drive.job("a")
    assert len(drive.loading) == 1


def test_what_is_loaded_on_a_gpu_that_vanished_stays_in_the_books_until_it_is_gone():
    drive = Drive([model("a", 20), model("b", 20)], [gpu("g0", 24), gpu("g1", 24)])
    drive.job("a")
    drive.settle()
    (load,) = drive.ready.values()
    (there,) = load.shares
    other = "g1" if there == "g0" else "g0"
    drive.tell(fx.Listed((gpu(other, 24),)))
    drive.job("b")
    assert [set(each.shares) for each in drive.loading.values()] == [{other}]
    drive.tell(fx.Listed((gpu("g0", 24), gpu("g1", 24))))
    assert drive.scheduler._do.fleet.gpus[there].ours == 20 * GIB


def test_what_settles_gives_back_what_it_was_promised_too_much():
    drive = Drive([model("a", 20, estimated=True), model("b", 15)], [gpu("g", 24)])
    job = drive.job("a")
    drive.settle()
    drive.end(job)
    (number,) = drive.ready
    drive.tell(fx.Settles(number, {"g": 4 * GIB}))
    drive.ready[number] = fx.Load(number, "a", {"g": 4 * GIB})
    drive.job("b")
    assert len(drive.loading) == 1
    assert not drive.leaving


def test_a_load_that_is_nearly_done_is_finished_though_nobody_waits():
    drive = Drive([model("a", 5)], [gpu("g", 24)])
    job = drive.job("a")
    (number,) = drive.loading
    drive.tell(fx.NearlyLoaded(number))
    drive.cancel(job)
    assert number in drive.loading
