"""What a failed attempt does to its job, as one table."""

from __future__ import annotations

import pytest

from coordinator.store.base import LONGEST_BACKOFF_MS, Failing, after_failure
from protocol.faults import Fault

CRASH = Fault("engine_crashed", "It crashed.")
WRONG = Fault("invalid_parameter", "It is wrong.")
FORCED = Fault("command_failed", "Exit code 42.", retryable=True)


@pytest.mark.parametrize(
    ("tries", "most", "streamed", "deadline", "fault", "expected"),
    [
        (1, 3, False, 0, CRASH, 250),
        (2, 3, False, 0, CRASH, 500),
        (1, 3, False, 0, FORCED, 250),
        (30, 99, False, 0, CRASH, LONGEST_BACKOFF_MS),
        (1, 3, False, 1251, CRASH, 250),
        (1, 3, False, 1250, CRASH, "deadline_exceeded"),
        (1, 3, False, 0, WRONG, "invalid_parameter"),
        (1, 3, True, 0, CRASH, "engine_crashed"),
        (1, 1, False, 0, CRASH, "engine_crashed"),
        (3, 3, False, 0, CRASH, "engine_crashed"),
        (3, 3, False, 0, WRONG, "invalid_parameter"),
    ],
)
def test_requeue_or_end(
    tries: int, most: int, streamed: bool, deadline: int, fault: Fault, expected: int | str
) -> None:
    decided = after_failure(Failing(tries, most, streamed, deadline), fault, now_ms=1000)
    assert (decided.code if isinstance(decided, Fault) else decided) == expected
