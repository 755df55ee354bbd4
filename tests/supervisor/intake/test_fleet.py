"""The scheduler's books: what is written down goes up and down by the same."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from supervisor.intake.effects import DevicePlan, ModelPlan
from supervisor.intake.fleet import Fleet, Gpu, Instance, Model, Stage


def fleet() -> Fleet:
    gpus = {uuid: Gpu(DevicePlan(uuid=uuid, total_bytes=100), 10) for uuid in ("g", "h")}
    plans = [ModelPlan(name="a", group="x"), ModelPlan(name="b", group="x"), ModelPlan(name="c")]
    return Fleet(gpus, {plan.name: Model(plan, ({"g": 20, "h": 5},), {"g": 90, "h": 90}) for plan in plans})


def test_memory_is_written_down_once():
    books = fleet()
    one = Instance(1, books.models["a"], {"g": 20, "h": 5})
    books.gpus["g"].foreign = 30
    books.add(one)
    assert (books.gpus["g"].free, books.gpus["h"].free) == (40, 85)
    books.reserve(books.models["c"], {"g": 15})
    assert books.gpus["g"].free == 25
    books.ends(one, Stage.DRAINING)
    books.ends(one, Stage.LEAVING)
    assert books.gpus["g"].coming == 20
    books.holds(one, "g", 26)
    assert (books.gpus["g"].coming, books.gpus["g"].free) == (26, 19)
    books.remove(one)
    assert (books.gpus["g"].coming, books.gpus["g"].free) == (0, 45)
    books.reserve(books.models["c"], None)
    assert books.gpus["g"].free == 60


def test_the_smallest_share_of_a_model_follows_its_places():
    model = fleet().models["a"]
    assert model.least == 5
    model.move(({"g": 30}, {"h": 25}), {})
    assert model.least == 25
    model.move(({},), {})
    assert model.least == 0


def test_what_drained_may_stay():
    books = fleet()
    one = Instance(1, books.models["a"], {"g": 20})
    books.add(one)
    one.stage = Stage.READY
    books.ends(one, Stage.DRAINING)
    assert books.models["a"].live == 0
    books.stays(one)
    assert (books.gpus["g"].coming, books.models["a"].ready) == (0, 1)
    one.barred = True
    assert (books.models["a"].live, books.models["a"].ready) == (0, 0)


def test_rivals_are_the_others_of_a_group():
    books = fleet()
    for number, name in enumerate("aabc"):
        books.add(Instance(number, books.models[name], {"g": 1}))
    assert [each.id for each in books.rivals(books.models["b"])] == [0, 1]
    assert books.rivals(books.models["c"]) == []


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=40))
def test_the_sums_are_those_of_the_instances(steps):
    books, made = fleet(), 0
    for which, what in steps:
        here = list(books.instances.values())
        one = here[which % len(here)] if here else None
        if what == 0:
            books.add(Instance(made, books.models["abc"[which % 3]], {"g": which, "h": 1}))
            made += 1
        elif one is not None and what == 1 and one.live:
            books.ends(one, Stage.DRAINING)
        elif one is not None and what == 2:
            books.ends(one, Stage.LEAVING)
        elif one is not None and what == 3:
            books.remove(one)
        for uuid, gpu in books.gpus.items():
            assert gpu.ours == sum(each.shares[uuid] for each in books.instances.values())
            assert gpu.coming == sum(each.shares[uuid] for each in books.instances.values() if not each.live)
            assert set(gpu.instances) == set(books.instances)
            assert books.free()[uuid] == gpu.free == 90 - gpu.ours
