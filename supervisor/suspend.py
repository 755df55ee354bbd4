"""Notices that the machine slept.

Two clocks of every system differ by exactly the time it was asleep: one stands still meanwhile and the other does
not. Comparing them needs no permission and no service to listen to, and works for a closed lid as for a paused
virtual machine that its host reports. What to do about it is the callback's business: engines that were healthy when
the lid closed must not be ended for silence that nobody could have broken.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import trio

INTERVAL_S = 1.0
# Less is the jitter of reading two clocks one after the other, or a blink that no limit would notice.
LEAST_S = 2.0

Clock = Callable[[], float]


class Clocks(NamedTuple):
    """Seconds of both kinds.

    Attributes:
        awake: stands still while the machine sleeps.
        always: goes on.
    """

    awake: Clock
    always: Clock


def system_clocks() -> Clocks | None:
    """The two clocks of this system; None when it has no such pair."""
    if sys.platform == "win32":
        return _windows_clocks()
    pairs = (("CLOCK_MONOTONIC", "CLOCK_BOOTTIME"), ("CLOCK_UPTIME_RAW", "CLOCK_MONOTONIC_RAW"))
    awake, always = pairs[1] if sys.platform == "darwin" else pairs[0]
    if not hasattr(time, awake) or not hasattr(time, always):
        return None
    first, second = getattr(time, awake), getattr(time, always)
    return Clocks(lambda: time.clock_gettime(first), lambda: time.clock_gettime(second))


def _windows_clocks() -> Clocks:  # pragma: no cover  run on Windows only
    kernel: ctypes.CDLL = ctypes.windll.kernel32  # type: ignore[attr-defined,unused-ignore]
    kernel.GetTickCount64.restype = ctypes.c_uint64

    def awake() -> float:
        hundreds_of_ns = ctypes.c_uint64()
        kernel.QueryUnbiasedInterruptTime(ctypes.byref(hundreds_of_ns))
        return hundreds_of_ns.value / 1e7

    def always() -> float:
        return float(kernel.GetTickCount64()) / 1e3

    return Clocks(awake, always)


class SleepWatch:
    """Compares the clocks and reports each sleep once.

    Args:
        on_slept: called with the seconds that the machine slept; must not block.
    """

    def __init__(
        self, on_slept: Callable[[float], None], *, clocks: Clocks | None = None, interval_s: float = INTERVAL_S
    ) -> None:
        self._on_slept = on_slept
        self._clocks = clocks or system_clocks()
        self._interval_s = interval_s
        self._lag_s = self._measure()

    async def run(self) -> None:
        """Look until cancelled; returns at once on a system without such clocks."""
        while self._clocks is not None:
            await trio.sleep(self._interval_s)
            self.look()

    def look(self) -> float:
        """Compare now; returns the seconds slept since the last look, 0 when it was less than `LEAST_S`."""
        lag_s = self._measure()
        slept_s, self._lag_s = lag_s - self._lag_s, lag_s
        if slept_s <= LEAST_S:
            return 0.0
        self._on_slept(slept_s)
        return slept_s

    def _measure(self) -> float:
        return self._clocks.always() - self._clocks.awake() if self._clocks else 0.0
