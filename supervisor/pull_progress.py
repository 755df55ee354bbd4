"""The line that shows how far a pull is: a bar on a terminal, a line every two seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TextIO

import msgspec

from supervisor.pull_wire import Note, Plan, Progress, PullFailed

Shown = Plan | Progress | Note | PullFailed

PLAIN_EVERY_S = 2.0
_RATE_OVER_S = 5.0  # the speed shown is the mean over this long: steady, and soon true after a stall
_BAR_CELLS = 24


def size(count: float | int | None) -> str:
    """ "1.4 GiB"; "size unknown" for None."""
    if count is None:
        return "size unknown"
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


class ProgressLine:
    """Writes to one stream.

    Args:
        stream: a terminal is recognised by `isatty`.
        clock: seconds, monotonic.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._tty = stream.isatty()
        self._drawn = False
        self._last_s = clock()  # nobody needs a line for what takes less
        self._seen: list[tuple[float, int]] = []

    def say(self, event: Shown) -> None:
        """Show what a pull tells. How it failed is said elsewhere, when the command ends."""
        match event:
            case Plan(files=files, total_bytes=total, origin=origin):
                self.note(f"{origin}: {len(files)} file{'s' if len(files) != 1 else ''}, {size(total)}")
            case Progress():
                self.show(event)
            case Note(text=text):
                self.note(text)

    def note(self, text: str) -> None:
        """A line of its own."""
        self._clear()
        self._stream.write(text + "\n")
        self._stream.flush()

    def show(self, progress: Progress) -> None:
        """Draw, or say so when it is time."""
        now = self._clock()
        if self._seen and progress.done_bytes < self._seen[-1][1]:
            self._seen.clear()  # another phase began
        self._seen.append((now, progress.done_bytes))
        while len(self._seen) > 2 and now - self._seen[0][0] > _RATE_OVER_S:
            self._seen.pop(0)
        if self._tty:
            self._stream.write(f"\r{self._text(progress)}\033[K")
            self._drawn = True
        elif now - self._last_s >= PLAIN_EVERY_S:
            self._last_s = now
            self._stream.write(self._text(progress) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Leave the terminal as a command expects it."""
        self._clear()

    def _clear(self) -> None:
        if self._drawn:
            self._stream.write("\r\033[K")
            self._drawn = False

    def _text(self, progress: Progress) -> str:
        done, total = progress.done_bytes, progress.total_bytes
        parts = [progress.phase]
        if total:
            share = min(1.0, done / total)
            if self._tty:
                full = round(share * _BAR_CELLS)
                parts.append("█" * full + "░" * (_BAR_CELLS - full))
            parts.append(f"{share * 100:3.0f}%  {size(done)} of {size(total)}")
        else:
            parts.append(size(done))
        (first_s, first), (last_s, last) = self._seen[0], self._seen[-1]
        if last_s > first_s and last > first:
            rate = (last - first) / (last_s - first_s)
            parts.append(f"{size(rate)}/s")
            if total and total > done:
                parts.append(f"{_clock_text((total - done) / rate)} left")
        return "  ".join([*parts, progress.file])


def _clock_text(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class EventLines:
    """For programs: each event as one line of JSON, its kind in `t`; the last is `done` or `failed`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def say(self, event: Shown) -> None:
        """Write an event as it is on the wire of the pull child."""
        self._write(msgspec.json.encode(event))

    def done(self, **fields: Any) -> None:
        """The pull is through."""
        self._write(msgspec.json.encode({"t": "done", **fields}))

    def close(self) -> None:
        """Nothing is left to do; the counterpart of `ProgressLine.close`."""

    def _write(self, line: bytes) -> None:
        self._stream.write(line.decode() + "\n")
        self._stream.flush()
