from __future__ import annotations

import msgspec
import trio
import trio.testing

from protocol.faults import Fault
from protocol.link_wire import Chunk, Fail, Held, Offer
from supervisor.link.ledger import CHUNK_BYTES, MAX_UNACKED_BYTES, Claim, Ledger


def claim(job: str = "j", attempt: int = 1, model: str = "m") -> Claim:
    return Claim(job, attempt, Offer(kind="llm", model=model, params=msgspec.Raw(b"\x80")), None)


def chunk(seq: int, size: int = 1) -> Chunk:
    return Chunk(seq=seq, data=msgspec.Raw(b"x" * size))


def test_chunks_stay_until_they_are_acknowledged():
    held = claim()
    for seq in range(5):
        assert held.keep(chunk(seq))
    held.acked(2)
    assert [kept.seq for kept in held.unacked] == [3, 4]
    held.acked(1)
    held.acked(9)
    assert held.unacked == ()
    assert held.streamed


def test_memory_for_chunks_is_bounded_and_acknowledgements_free_it():
    held = claim()
    assert held.keep(chunk(0, MAX_UNACKED_BYTES - CHUNK_BYTES))
    assert not held.keep(chunk(1))
    held.acked(0)
    assert held.keep(chunk(2))


def test_what_a_ledger_counts_and_tells():
    ledger = Ledger()
    first, second = claim("a"), claim("b", 2, "n")
    second.started = True
    ledger.record(first)
    ledger.record(second)
    assert ledger.held() == (), "the coordinator has not been told that they are taken"
    first.accepted = second.accepted = True
    assert ledger.held() == (Held(job="a", attempt=1), Held(job="b", attempt=2, started=True))
    assert (ledger.taken("m"), ledger.taken("n"), ledger.running, len(ledger)) == (1, 1, 2, 2)
    first.end = Fail(fault=Fault("engine_failed", "x"))
    assert (ledger.taken("m"), ledger.running, len(ledger)) == (0, 1, 2)
    assert ledger.get("a", 1) is first
    assert ledger.get("a", 2) is None


async def test_waiting_for_an_empty_ledger():
    ledger = Ledger()
    await ledger.wait_empty()
    one, two = claim("a"), claim("b")
    ledger.record(one)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ledger.wait_empty)
        await trio.testing.wait_all_tasks_blocked()
        ledger.record(two)
        ledger.forget(one)
        await trio.testing.wait_all_tasks_blocked()
        assert nursery.child_tasks
        ledger.forget(two)


async def test_waiting_until_a_model_is_not_needed():
    ledger = Ledger()
    await ledger.wait_without("m")
    ended, kept, gone = claim("a"), claim("b"), claim("c")
    for one in (ended, kept, gone):
        ledger.record(one)
    await ledger.wait_without("n")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ledger.wait_without, "m")
        ended.end = Fail(fault=Fault("engine_failed", "x"))
        ledger.moved()
        ledger.forget(gone)
        await trio.testing.wait_all_tasks_blocked()
        assert nursery.child_tasks
        kept.kept = True
        ledger.moved()
