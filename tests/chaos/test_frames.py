"""What a worker cannot read, or does not know, costs that job and not the session. By dice, with their seed."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest

from protocol import link_wire as wire
from supervisor.testing import FakePeer
from tests.supervisor.link.test_worker import CHAT, Rig, rig

SEED = int(os.environ.get("BULKHEAD_CHAOS_SEED", "1"))
OFFERS = int(os.environ.get("BULKHEAD_CHAOS_JOBS", "150"))
GOOD = {"kind": "llm", "model": "chat", "params": CHAT, "deadline_ms": 60_000, "labels": {"a": "b"}}


async def offer_raw(peer: FakePeer, job: str, body: bytes, tag: str = "offer") -> None:
    """An envelope with any bytes as its body; the fake coordinator's own session takes it for an offer."""
    if tag == "offer":
        peer.session.sending(wire.Offer(kind="", model="", params=msgspec.Raw(b"\x80")), job, 1)
    # By hand: a body that is no msgpack cannot be encoded into an envelope that is.
    head = msgspec.msgpack.encode({"t": tag, "job": job, "attempt": 1})
    await peer.send_raw(bytes([head[0] + 1]) + head[1:] + msgspec.msgpack.encode("body") + body)


async def answer_to(peer: FakePeer, job: str) -> Any:
    """Accept or decline, of this very job."""
    while True:
        body, about, _ = await peer.receive()
        if isinstance(body, wire.Accept | wire.Decline):
            assert about == job
            return body


async def still_works(r: Rig, peer: FakePeer, job: str) -> None:
    """The same session takes a job, and brings its end."""
    run = await r.offered(peer, job)
    run.done({"text": "x"})
    await peer.expect(wire.Complete)
    await peer.send(wire.Ack(), job, 1)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({**GOOD, "kind": 5}, "bad_offer"),
        ({**GOOD, "kind": "hologram"}, "unsupported"),
        ({**GOOD, "kind": "x-hologram"}, "unsupported"),
        ({**GOOD, "model": "of-a-newer-version"}, "unknown_model"),
        ({**GOOD, "model": None}, "bad_offer"),
        ({**GOOD, "inputs": [{"name": "a"}]}, "bad_offer"),
        ({**GOOD, "deadline_ms": "soon"}, "bad_offer"),
        ({}, "bad_offer"),
        ([1, 2], "bad_offer"),
        (None, "bad_offer"),
    ],
)
async def test_an_offer_that_is_not_understood_is_declined_with_a_reason(tmp_path: Path, body: Any, code: str) -> None:
    async with rig(tmp_path) as r:
        peer = await r.session()
        await offer_raw(peer, "odd", msgspec.msgpack.encode(body))
        answer = await answer_to(peer, "odd")
        assert isinstance(answer, wire.Decline)
        assert answer.code == code, answer
        assert answer.reason
        await still_works(r, peer, "plain")


async def test_a_message_of_a_newer_revision_is_passed_over(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        peer = await r.session()
        for job in ("odd", ""):
            await offer_raw(peer, job, msgspec.msgpack.encode({"steps": 3}), tag="dance")
        await still_works(r, peer, "plain")


async def test_offers_with_bytes_that_dice_have_changed(tmp_path: Path) -> None:
    """Each is taken or declined; none ends the session, and the worker serves as before."""
    dice, outcomes = random.Random(SEED), {"accept": 0, "decline": 0}
    async with rig(tmp_path) as r:
        peer = await r.session()
        for number in range(OFFERS):
            body = bytearray(msgspec.msgpack.encode(GOOD))
            for _ in range(dice.randint(1, 3)):
                body[dice.randrange(len(body))] = dice.randrange(256)
            if not whole(bytes(body)):
                continue  # the envelope itself cannot be read then, which is the session's fault: test_session.py
            job = f"job_{number}"
            await offer_raw(peer, job, bytes(body))
            answer = await answer_to(peer, job)
            if isinstance(answer, wire.Decline):
                outcomes["decline"] += 1
                assert answer.reason, (SEED, number)
                continue
            outcomes["accept"] += 1
            run = await r.host.next_run()
            run.fail("invalid_parameter")
            await peer.expect(wire.Fail)
            await peer.send(wire.Ack(), job, 1)
        await still_works(r, peer, "plain")
        assert min(outcomes.values()) > OFFERS / 20, (SEED, outcomes)


def whole(body: bytes) -> bool:
    """Whether it is one value of msgpack."""
    try:
        wire.decode_envelope(bytes([0x82]) + b"\xa1t\xa5offer" + msgspec.msgpack.encode("body") + body)
    except wire.EnvelopeError:
        return False
    return True
