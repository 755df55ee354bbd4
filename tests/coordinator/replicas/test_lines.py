"""Lines of jobs that other replicas keep."""

from __future__ import annotations

import anyio
import pytest

from coordinator.kept_lines import KeptLines, Lines
from coordinator.replicas import lines
from coordinator.replicas.frames import AnswerFrame, OrderFrame
from coordinator.replicas.lines import ITSELF, Inquiry, answer
from protocol import link_wire as wire


def kept(*messages: str) -> KeptLines:
    found = KeptLines()
    for message in messages:
        found.keep("w", "then", "info", message, "j")
    return found


class Others:
    """Replicas by name; None is one that takes the question and says nothing."""

    def __init__(self, **known: KeptLines | None) -> None:
        self.known = known
        self.inquiry = Inquiry(self.push)

    def push(self, name: str, frame: OrderFrame) -> bool:
        if name not in self.known:
            return False
        if (there := self.known[name]) is not None:
            found = answer(frame, there)
            assert found is not None
            self.inquiry.answered(name, found)
        return True


def ask(others: Others, *names: str, limit: int = 10) -> tuple[list[Lines], list[str]]:
    async def asked() -> tuple[list[Lines], list[str]]:
        with anyio.fail_after(30):
            return await others.inquiry.ask(names, "j", "", limit)

    return anyio.run(asked)


def test_every_replica_is_asked_and_who_says_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "ANSWER_S", 0.01)
    found, silent = ask(Others(a=kept("1"), b=kept("2", "3"), mute=None), "a", "b", "mute", "away", limit=1)
    assert sorted(line.message for one in found for line in one.lines) == ["1", "3"]
    assert sorted(one.more for one in found) == [0, 1]
    assert silent == ["mute", "away"]


def test_nobody_is_waited_for_longer_than_it_takes() -> None:
    assert ask(Others(a=kept()), "a")[1] == []  # ANSWER_S is not waited out where all have said something
    assert ask(Others()) == ([], [])
    assert ask(Others(), "away") == ([], ["away"])


def test_answers_to_nothing_and_of_another_shape_mean_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "ANSWER_S", 0.01)
    others = Others()
    for message in (b"", wire.encode(wire.Drain()), wire.encode(wire.OrderDone(id="x", ok=True))):
        others.inquiry.answered("a", AnswerFrame(ITSELF, message))

    def odd(_name: str, frame: OrderFrame) -> bool:
        order = wire.decode_body(wire.decode_envelope(frame.message), wire.DOWN)
        assert isinstance(order, wire.Order)
        reply = wire.OrderDone(id=order.id, ok=True, detail={"lines": 7})
        others.inquiry.answered("a", AnswerFrame(ITSELF, wire.encode(reply)))
        return True

    others.inquiry = Inquiry(odd)
    assert ask(others, "a") == ([], ["a"])


@pytest.mark.parametrize(
    "order",
    [
        b"",
        wire.encode(wire.Drain()),
        wire.encode(wire.Order(id="n", verb="probe")),
        wire.encode(wire.Order(id="n", verb=lines.VERB, arguments={"job": 7})),
    ],
)
def test_what_is_no_question_is_not_answered(order: bytes) -> None:
    assert answer(OrderFrame(ITSELF, order), kept("1")) is None
