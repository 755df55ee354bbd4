"""One order to a lane: devices in the order of the configuration, and what a spread model is told."""

from __future__ import annotations

import trio

from protocol import engine_wire as wire
from supervisor.host.order import Order
from supervisor.host.work import EngineSpec, ModelSpec

GIB = 2**30


def spec(*devices: str, **options: object) -> ModelSpec:
    engine = EngineSpec(name="llm", module="none", python="none")
    return ModelSpec(name="m", engine=engine, model=wire.Model(name="m", devices=devices, options=options))


def test_where_nothing_is_known_of_its_devices_the_configuration_stays():
    assert Order(1, spec("A", "B"), {}).spec == spec("A", "B")


def test_it_sees_the_devices_that_it_was_given_and_no_others():
    assert Order(1, spec("A", "B", n_ctx=1), {"B": GIB}).spec == spec("B", n_ctx=1)
    assert Order(1, spec(), {"C": GIB}).spec.model.devices == ("C",)


def test_a_model_that_is_spread_is_told_its_shares_in_the_order_of_its_devices():
    made = Order(1, spec("A", "B"), {"B": 3 * GIB, "A": GIB}).spec.model
    assert (made.devices, made.options["tensor_split"]) == (("A", "B"), [1024.0, 3072.0])
    told = Order(1, spec("A", "B", tensor_split=[1.0, 1.0]), {"A": GIB, "B": 3 * GIB}).spec.model
    assert told.options["tensor_split"] == [1.0, 1.0]  # the operator's word


async def test_one_that_is_dropped_is_not_waited_for(autojump_clock):
    order = Order(1, spec(), {})
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            with order.wanted():
                await trio.sleep(100)

        nursery.start_soon(wait)
        await trio.sleep(1)
        order.drop("nobody waits for it any more")
    with order.wanted():  # nor what comes after
        await trio.sleep(100)
    assert trio.current_time() - 1 < 1
