"""The journal: what it keeps of a claim, and what it does not."""

from __future__ import annotations

import msgspec
import pytest

from protocol import link_wire as wire
from protocol.engine_wire import OutputFile
from protocol.faults import Fault
from supervisor.link.journal import Journal, Result
from supervisor.store import open_store

OFFER = wire.Offer(
    kind="chat", model="m", params=msgspec.Raw(msgspec.msgpack.encode({"prompt": "a secret"})), upload="/up/{name}"
)


@pytest.fixture
async def store(tmp_path):
    async with open_store(tmp_path / "db") as opened:
        yield opened


@pytest.fixture
def journal(store):
    return Journal(store, now_ms=iter(range(1, 1000)).__next__)


async def test_a_claim_from_its_offer_to_its_acknowledgement(journal):
    await journal.claimed("a", 1, OFFER)
    await journal.claimed("b", 2, OFFER)
    await journal.claimed("c", 1, OFFER)
    file = OutputFile("x.png", "image/png", 3, "ab" * 32)
    result = Result(body=b"\x81", files=(file,), usage={"images": 1.0})
    await journal.done("a", 1, result, 3)
    await journal.failed("c", 1, Fault("engine_crashed", "It crashed."), streamed=True)
    a, b, c = await journal.kept()
    assert (a.job, a.attempt, a.result, a.fault, a.bytes, a.streamed) == ("a", 1, result, None, 3, False)
    assert (b.job, b.attempt, b.result, b.fault, b.streamed) == ("b", 2, None, None, False)
    assert (c.job, c.fault, c.streamed) == ("c", Fault("engine_crashed", "It crashed."), True)
    assert a.offer.upload == "/up/{name}"
    await journal.check()
    for job, attempt in (("a", 1), ("b", 2), ("c", 1)):
        await journal.forget(job, attempt)
    assert await journal.kept() == []


async def test_what_a_client_asked_for_is_not_written_down(journal, tmp_path):
    await journal.claimed("a", 1, OFFER)
    (kept,) = await journal.kept()
    assert bytes(kept.offer.params) == b"\x80"
    assert all(b"a secret" not in path.read_bytes() for path in tmp_path.iterdir())


async def test_a_row_that_cannot_be_read_is_forgotten_and_the_others_are_not(journal, store):
    await journal.claimed("a", 1, OFFER)
    await journal.claimed("b", 1, OFFER)
    await store.write(lambda c: c.execute("UPDATE claims SET offer = x'c1' WHERE job = 'a'") and None)
    assert [kept.job for kept in await journal.kept()] == ["b"]
    assert [kept.job for kept in await journal.kept()] == ["b"]
