"""Lines of a job that other replicas keep: each is asked, and who does not answer in time is named.

The question is an order for no worker, which is one for the replica itself. A replica of an older version lets it
pass, and counts as one that did not answer.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import anyio
import msgspec

from coordinator.kept_lines import KeptLines, Lines
from coordinator.replicas.frames import AnswerFrame, OrderFrame
from coordinator.replicas.remote import order_done
from protocol import link_wire as wire

ITSELF = ""  # instead of a worker's id
VERB = "job_lines"
ANSWER_S = 3.0


class _Wanted(msgspec.Struct, frozen=True):
    job: str
    worker: str
    limit: int


class Inquiry:
    """Questions that are open. Everything is called on the event loop.

    Args:
        push: hands a frame to a replica by its name; False when it is not reached now.
    """

    def __init__(self, push: Callable[[str, OrderFrame], bool]) -> None:
        self._push = push
        self._open: dict[str, Callable[[str, Lines], None]] = {}  # number of the question -> who takes answers

    async def ask(self, replicas: Sequence[str], job: str, worker: str, limit: int) -> tuple[list[Lines], list[str]]:
        """What they keep of a job, and which of them said nothing within `ANSWER_S`. Cancellation: nobody waits."""
        number, asked, found = secrets.token_hex(8), set[str](), dict[str, Lines]()
        said = anyio.Event()

        def take(replica: str, lines: Lines) -> None:
            found[replica] = lines
            if len(found) >= len(asked):
                said.set()

        arguments = {"job": job, "worker": worker, "limit": limit}
        order = OrderFrame(ITSELF, wire.encode(wire.Order(id=number, verb=VERB, arguments=arguments)))
        self._open[number] = take
        try:
            asked |= {name for name in replicas if self._push(name, order)}
            with anyio.move_on_after(ANSWER_S):
                if len(found) < len(asked):
                    await said.wait()
        finally:
            del self._open[number]
        return list(found.values()), [name for name in replicas if name not in found]

    def answered(self, sender: str, frame: AnswerFrame) -> None:
        """A replica has answered; what is no answer to a question of ours means nothing."""
        done = order_done(frame.message)
        if done is None or (take := self._open.get(done.id)) is None:
            return
        with contextlib.suppress(msgspec.ValidationError):
            take(sender, msgspec.convert(done.detail, Lines))


def answer(frame: OrderFrame, kept: KeptLines) -> AnswerFrame | None:
    """What we answer another replica; None for anything but its question."""
    try:
        body = wire.decode_body(wire.decode_envelope(frame.message), wire.DOWN)
    except (wire.EnvelopeError, wire.BodyError):
        return None
    if not isinstance(body, wire.Order) or body.verb != VERB:
        return None
    try:
        wanted = msgspec.convert(body.arguments, _Wanted)
    except msgspec.ValidationError:
        return None
    detail: dict[str, Any] = msgspec.to_builtins(kept.of(wanted.job, wanted.worker, max(0, wanted.limit)))
    return AnswerFrame(ITSELF, wire.encode(wire.OrderDone(id=body.id, ok=True, detail=detail)))
