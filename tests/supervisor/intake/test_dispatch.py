"""Single acts on the scheduler's books."""

from __future__ import annotations

from supervisor.intake import effects as fx
from supervisor.intake.dispatch import Dispatch
from supervisor.intake.fleet import Fleet, Gpu, Instance, Model, Stage
from supervisor.intake.reasons import why


def dispatch(*needs: int) -> Dispatch:
    gpus = {"g": Gpu(fx.DevicePlan(uuid="g", total_bytes=100), 0)}
    models = {
        f"m{n}": Model(fx.ModelPlan(name=f"m{n}", need_bytes=need), ({"g": need},), {"g": 100})
        for n, need in enumerate(needs)
    }
    return Dispatch(Fleet(gpus, models), spread=True)


def queue(do: Dispatch, name: str) -> Model:
    model = do.fleet.models[name]
    job = fx.Job(id=f"{name}-job", model=name, at=do.now)
    model.waiting.push(job)
    do.jobs[job.id] = model
    return model


def ready(do: Dispatch, name: str, runs: int = 0) -> Instance:
    one = Instance(100 + len(do.fleet.instances), do.fleet.models[name], {"g": do.fleet.models[name].plan.need_bytes})
    do.fleet.add(one)
    one.stage, one.runs, one.ready_at = Stage.READY, runs, -1e6
    return one


def test_a_model_that_is_stuck_holds_up_nobody_and_is_helped_when_room_comes():
    do = dispatch(80, 30)
    do.fleet.gpus["g"].foreign = 50
    stuck, small = queue(do, "m0"), queue(do, "m1")
    do.look(stuck)
    assert stuck.stuck
    do.look(small)
    assert [effect.model for effect in do.out if isinstance(effect, fx.Load)] == ["m1"]
    do.fleet.remove(do.fleet.instances[1])
    do.fleet.gpus["g"].foreign = 0
    do.room()
    assert do.clock.time_of(stuck) == do.now


def test_who_was_to_go_stays_when_the_place_is_given_up():
    do = dispatch(80, 80)
    working = ready(do, "m0", runs=1)
    newcomer = queue(do, "m1")
    do.fleet.reserve(newcomer, {"g": 80})
    do.targets.append(newcomer)
    do.end(working, "m1 takes its turn")
    assert working.stage is Stage.DRAINING
    assert why(newcomer, do.fleet).endswith(" on g: m0 is working")
    do.give_up(newcomer)
    assert working.stage is Stage.READY
    assert (do.fleet.gpus["g"].coming, do.fleet.gpus["g"].reserved) == (0, 0)


def test_a_place_that_other_programs_took_is_given_up():
    do = dispatch(80)
    model = queue(do, "m0")
    do.fleet.reserve(model, {"g": 80})
    do.targets.append(model)
    do.fleet.gpus["g"].foreign = 50
    do.room()
    assert model.target is None
    assert do.clock.time_of(model) is not None


def test_a_reason_is_told_once():
    do = dispatch(80)
    do.fleet.gpus["g"].foreign = 50
    model = queue(do, "m0")
    do.look(model)
    do.look(model)
    assert len([effect for effect in do.out if isinstance(effect, fx.Waits)]) == 1
