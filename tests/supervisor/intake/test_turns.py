"""Where a model may load now, whom that ends, or when to look again."""

from __future__ import annotations

import pytest

from supervisor.intake.effects import DevicePlan, Job, ModelPlan
from supervisor.intake.eviction import Demand
from supervisor.intake.fleet import Fleet, Gpu, Instance, Model, Stage
from supervisor.intake.turns import LATEST_S, PATIENCE_S, SLICES, Go, Later, Look, Swap, look, overdue

NOW = 10_000.0
SWAP_S = 22.0  # two loads of 10 s and the memory's return


def fleet(*, sizes=(100, 100), needs=None) -> Fleet:
    gpus = {f"g{n}": Gpu(DevicePlan(uuid=f"g{n}", total_bytes=size), 0) for n, size in enumerate(sizes)}
    models = {}
    for name, need in (needs or {"new": 60, "a": 60, "b": 60, "c": 30}).items():
        places = tuple({uuid: need} for uuid, gpu in gpus.items() if need <= gpu.plan.total_bytes)
        models[name] = Model(ModelPlan(name=name, need_bytes=need), places, {})
    return Fleet(gpus, models)


def jobs(model: Model, count: int, waited_s: float = 0.0) -> None:
    for number in range(count):
        model.waiting.push(Job(id=f"{model.plan.name}-{number}", model=model.plan.name, at=NOW - waited_s))


def put(books: Fleet, name: str, on: str, *, age_s: float = 1e4, runs: int = 0, stage: Stage = Stage.READY) -> Instance:
    model = books.models[name]
    one = Instance(len(books.instances), model, {on: model.plan.need_bytes})
    books.add(one)
    one.ready_at, one.runs = NOW - age_s, runs
    if stage is Stage.LOADING:
        return one
    one.stage = Stage.READY
    if stage is not Stage.READY:
        books.ends(one, stage)
    return one


def judge(books: Fleet, ahead: str = "", *, spread: bool = True):
    return look(books.models["new"], books, Look(NOW, books.models.get(ahead), spread))


@pytest.mark.parametrize(("spread", "where"), [(True, "g1"), (False, "g0")])
def test_a_free_place_is_taken(spread, where):
    books = fleet(sizes=(100, 100))
    put(books, "c", "g0", runs=1)
    jobs(books.models["new"], 1)
    assert judge(books, spread=spread) == Go({where: 60})


def test_a_model_that_takes_no_memory_loads_though_other_programs_hold_more_than_there_is():
    books = fleet(sizes=(100,), needs={"new": 0, "a": 60})
    books.models["new"].move(({},), {})
    books.gpus["g0"].foreign = 150
    jobs(books.models["new"], 1)
    assert judge(books) == Go({})


def test_the_few_places_that_lack_least_are_priced_and_of_equals_the_first():
    books = fleet(sizes=(100,) * 6)
    tenants = [put(books, "a" if number % 2 else "b", f"g{number}", runs=1) for number in range(6)]
    for one in tenants:
        one.model.demand = Demand(0.01, NOW)
    books.gpus["g1"].foreign = 30  # what is there, but of other programs, lacks more
    tenants[5].runs = 0  # the cheapest to end, and the fifth of five equals
    jobs(books.models["new"], 40, waited_s=60.0)
    assert judge(books) == Swap({"g0": 60}, (tenants[0].id,))


def test_several_go_when_together_they_hold_enough_and_none_when_they_do_not():
    books = fleet(sizes=(100,), needs={"new": 90, "a": 40, "b": 40})
    first, second = put(books, "a", "g0"), put(books, "b", "g0")
    books.gpus["g0"].foreign = 10
    jobs(books.models["new"], 1)
    turn = judge(books)
    assert isinstance(turn, Swap)
    assert sorted(turn.who) == [first.id, second.id]
    books.gpus["g0"].foreign = 11  # 89 would be free without both
    assert judge(books) == Later("pinned models, other programs or loads hold the memory", LATEST_S, stuck=True)


def test_an_idle_model_goes_at_once_and_the_cheaper_one():
    books = fleet()
    dear, cheap = put(books, "a", "g0"), put(books, "b", "g1")
    dear.model.demand = Demand(0.5, NOW)
    jobs(books.models["new"], 1)
    assert judge(books) == Swap({"g1": 60}, (cheap.id,))


def test_a_model_in_demand_is_not_ended_for_one_job_but_for_many():
    books = fleet(sizes=(100,))
    one = put(books, "a", "g0", runs=1)
    one.model.demand = Demand(0.2, NOW)
    harm = (1 + 0.2 * SWAP_S / 2) * SWAP_S
    jobs(books.models["new"], 1, waited_s=1.0)
    turn = judge(books)
    assert isinstance(turn, Later)
    assert not turn.stuck
    jobs_needed = int(harm) + 1
    books = fleet(sizes=(100,))
    put(books, "a", "g0", runs=1).model.demand = Demand(0.2, NOW)
    jobs(books.models["new"], jobs_needed, waited_s=1.0)
    assert isinstance(judge(books), Swap)


def test_patience_ends():
    books = fleet(sizes=(100,))
    put(books, "a", "g0", runs=1).model.demand = Demand(5.0, NOW)
    jobs(books.models["new"], 1, waited_s=PATIENCE_S)
    assert overdue(books.models["new"], NOW)
    assert isinstance(judge(books), Swap)


@pytest.mark.parametrize(("age_s", "turn"), [(SLICES * SWAP_S - 3, Later), (SLICES * SWAP_S, Swap)])
def test_who_has_work_keeps_its_slice(age_s, turn):
    books = fleet(sizes=(100,))
    put(books, "a", "g0", runs=1, age_s=age_s)
    jobs(books.models["new"], 1, waited_s=PATIENCE_S)
    found = judge(books)
    assert isinstance(found, turn)
    if isinstance(found, Later):
        assert 1.0 <= found.again_s <= LATEST_S
        assert not found.stuck


def test_the_one_that_waits_longest_is_first():
    books = fleet(sizes=(100,))
    put(books, "a", "g0")
    jobs(books.models["new"], 1, waited_s=PATIENCE_S)
    jobs(books.models["b"], 1, waited_s=PATIENCE_S + 10)
    turn = judge(books, ahead="b")
    assert isinstance(turn, Later)
    assert turn.reason == "b has waited longer"
    put(books, "c", "g0", stage=Stage.LEAVING)
    assert isinstance(judge(books), Swap)


def test_what_comes_back_anyhow_ends_nobody():
    books = fleet(sizes=(100,))
    put(books, "a", "g0", stage=Stage.LEAVING)
    put(books, "c", "g0")
    jobs(books.models["new"], 1)
    assert judge(books) == Swap({"g0": 60}, ())


def test_only_loads_in_progress_or_pins_in_the_way():
    books = fleet(sizes=(100,))
    put(books, "a", "g0", stage=Stage.LOADING)
    jobs(books.models["new"], 1, waited_s=1000)
    turn = judge(books)
    assert isinstance(turn, Later)
    assert not turn.stuck
    books.gpus["g0"].foreign = 90
    books = fleet(sizes=(100,))
    books.gpus["g0"].foreign = 90
    jobs(books.models["new"], 1, waited_s=1000)
    stuck = judge(books)
    assert isinstance(stuck, Later)
    assert stuck.stuck


def test_a_hold_names_itself():
    books = fleet(sizes=(100,))
    books.gpus["g0"].hold("held by the operator")
    jobs(books.models["new"], 1)
    assert judge(books) == Later("held by the operator", LATEST_S, stuck=True)
    books.gpus["g0"].hold("")
    books.held = "the whole box is held"
    assert judge(books) == Later("the whole box is held", LATEST_S, stuck=True)


def test_another_copy_must_pay_for_its_load():
    books = fleet()
    put(books, "new", "g0", runs=1)
    model = books.models["new"]
    model.run_s = 2.0
    jobs(model, 3)
    assert isinstance(judge(books), Later)  # 6 s of work, 10 s of load
    for number in range(4):
        model.waiting.push(Job(id=f"more-{number}", model="new", at=NOW))
    assert judge(books) == Go({"g1": 60})
