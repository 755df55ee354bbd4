"""Between a store and the event loop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import cast

import trio
import trio.testing

from coordinator.store import Store
from coordinator.store.threads import MOST_TOGETHER, StoreThreads, Together, hear

WAIT_S = 30.0


class Doubling:
    """A write that waits until it is let go, and notes what came together."""

    def __init__(self) -> None:
        self.go, self.begun = threading.Event(), threading.Event()
        self.calls: list[list[int]] = []

    def __call__(self, numbers: Sequence[int]) -> list[int]:
        self.begun.set()
        assert self.go.wait(WAIT_S)
        self.calls.append(list(numbers))
        if -1 in numbers:
            raise ValueError("not this one")
        return [2 * number for number in numbers]


async def begun(write: Doubling) -> None:
    assert await trio.to_thread.run_sync(write.begun.wait, WAIT_S)


async def test_calls_that_come_during_a_write_go_together_in_the_next() -> None:
    write = Doubling()
    together = Together(StoreThreads(), write)
    answers: dict[int, int] = {}

    async def one(number: int) -> None:
        answers[number] = await together(number)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one, 0)
        await begun(write)
        for number in range(1, MOST_TOGETHER + 11):
            nursery.start_soon(one, number)
        await trio.testing.wait_all_tasks_blocked()
        write.go.set()
    assert answers == {number: 2 * number for number in range(MOST_TOGETHER + 11)}
    assert [len(call) for call in write.calls] == [1, MOST_TOGETHER, 10]


async def test_one_that_fails_fails_alone() -> None:
    write = Doubling()
    together = Together(StoreThreads(), write)
    answers: list[int] = []
    failed: list[str] = []

    async def one(number: int) -> None:
        try:
            answers.append(await together(number))
        except ValueError as error:
            failed.append(str(error))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one, 0)
        await begun(write)
        for number in (12, -1, 14):
            nursery.start_soon(one, number)
        await trio.testing.wait_all_tasks_blocked()
        write.go.set()
    assert sorted(answers) == [0, 24, 28]
    assert failed == ["not this one"]


async def test_a_call_that_is_given_up_before_its_write_is_not_made() -> None:
    write = Doubling()
    together = Together(StoreThreads(), write)
    scope = trio.CancelScope()

    async def impatient() -> None:
        with scope:
            await together(2)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(together, 1)
        await begun(write)
        nursery.start_soon(impatient)
        await trio.testing.wait_all_tasks_blocked()
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        write.go.set()
    assert write.calls == [[1]]


class Bell:
    """As much of a store as rings."""

    ring: Callable[[], None]

    def listen(self, ring: Callable[[], None]) -> None:
        self.ring = ring


async def test_rings_from_a_thread_reach_the_loop() -> None:
    bell, heard = Bell(), trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hear, cast("Store", bell), heard.set)
        await trio.testing.wait_all_tasks_blocked()

        def ring_often() -> None:
            for _ in range(100_000):  # more than the pipe holds
                bell.ring()

        thread = threading.Thread(target=ring_often)
        thread.start()
        with trio.fail_after(WAIT_S):
            await heard.wait()
            await trio.to_thread.run_sync(thread.join)
        nursery.cancel_scope.cancel()
    bell.ring()  # nobody listens any more
