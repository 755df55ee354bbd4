"""What is open ends when its name is admitted no more."""

from __future__ import annotations

from coordinator.doors import Doors


def test_only_what_is_admitted_no_more_is_ended() -> None:
    admitted, ended = {"a", "b"}, list[str]()
    doors = Doors(lambda name: name in admitted)
    with (
        doors.hold("a", lambda: ended.append("a1")),
        doors.hold("a", lambda: ended.append("a2")),
        doors.hold("b", lambda: ended.append("b")),
    ):
        doors.look()
        assert ended == []
        admitted.remove("a")
        doors.look()
        assert ended == ["a1", "a2"]
    admitted.clear()
    doors.look()
    assert ended == ["a1", "a2"]  # nothing is open any more
    assert not doors._open


def test_what_is_not_admitted_when_it_opens_is_ended_at_once() -> None:
    ended = list[str]()
    with Doors(lambda _name: False).hold("a", lambda: ended.append("a")):
        assert ended == ["a"]
