"""Quiet hours: what worker.toml says, against the clock on the wall.

Hours are those of a clock in some place, so a night that has a change of the clocks in it is an hour longer or
shorter, and still ends when the clock there says so. Hours that begin in a gap of the clocks begin with the gap;
where a time comes twice, quiet hours begin at the first and end at the second, so that nobody is woken early.
"""

from __future__ import annotations

import datetime
import re
import time
import zoneinfo
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from supervisor.intake.observed import Quiet, Unknown

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_FORM = re.compile(r"(?:(?P<days>[a-z,-]+) )?(?P<start>\d\d:\d\d)-(?P<end>\d\d:\d\d)")


class QuietHours(NamedTuple):
    """One window.

    Attributes:
        text: as it was written.
        days: on which it begins; Monday is 0.
        start, end: minutes after midnight; an `end` at or before `start` is one of the next day.
    """

    text: str
    days: frozenset[int]
    start: int
    end: int


def parse(text: str) -> QuietHours:
    """Read one window. Raises ValueError with a sentence."""
    found = _FORM.fullmatch(text)
    if found is None:
        raise ValueError(f'"{text}" is no time span: write "22:00-07:00" or "mon-fri 08:00-18:00"')
    start, end = (_minutes(text, found[name]) for name in ("start", "end"))
    if start == 24 * 60:
        raise ValueError(f'"{text}" begins at 24:00: write 00:00 of the next day')
    return QuietHours(text, frozenset(_days(text, found["days"])), start, end)


def _minutes(text: str, clock: str) -> int:
    hour, minute = map(int, clock.split(":"))
    if hour > 24 or minute > 59 or (hour == 24 and minute):
        raise ValueError(f'"{text}" has a time that no clock shows: {clock}')
    return hour * 60 + minute


def _days(text: str, days: str | None) -> Iterable[int]:
    if not days:
        return range(7)
    found: set[int] = set()
    for part in days.split(","):
        first, _, last = part.partition("-")
        try:
            begin, finish = DAYS.index(first), DAYS.index(last or first)
        except ValueError:
            raise ValueError(f'"{text}" has a day that is none of {", ".join(DAYS)}: {part}') from None
        # "fri-mon" goes over the end of the week.
        found |= {(begin + step) % 7 for step in range((finish - begin) % 7 + 1)}
    return found


class Schedule:
    """The quiet hours of one worker.

    Args:
        time_zone: "" means the machine's own, as it is set at each moment: a laptop travels.

    Raises:
        ValueError: a span or the time zone cannot be understood; one sentence.
    """

    def __init__(self, quiet: Sequence[str], time_zone: str = "") -> None:
        self._hours = [parse(text) for text in quiet]
        self._zone = zone(time_zone)

    def at(self, now: float) -> Quiet | None:
        """The quiet hours at a moment (seconds since the epoch), and when they end; None outside them.

        Windows that touch or overlap are one: the end is where none goes on.
        """
        spans = self._spans(now)
        first = next((span for span in spans if span[0] <= now < span[1]), None)
        if first is None:
            return None
        until = first[1]
        for begin, end, _text in spans:
            if begin <= until < end:
                until = end
        return Quiet(text=first[2], until=until)

    def next(self, now: float) -> tuple[float, str] | None:
        """When quiet hours begin next (seconds since the epoch), and which; None during quiet hours, or for a week."""
        spans = [span for span in self._spans(now) if span[0] < span[1]]
        if any(begin <= now < end for begin, end, _text in spans):
            return None
        return next(((begin, text) for begin, _end, text in spans if begin > now), None)

    def _spans(self, now: float) -> list[tuple[float, float, str]]:
        if self._zone is None and hasattr(time, "tzset"):
            time.tzset()  # the C library looks for a changed /etc/localtime only then
        return sorted(self._around(now))

    def _around(self, now: float) -> Iterable[tuple[float, float, str]]:
        """Every window that begins from yesterday on, for a week: (begin, end, text)."""
        today = datetime.datetime.fromtimestamp(now, self._zone).date()
        for offset in range(-1, 8):
            day = today + datetime.timedelta(days=offset)
            for hours in self._hours:
                if day.weekday() in hours.days:
                    last = hours.end if hours.end > hours.start else hours.end + 24 * 60
                    yield self._moment(day, hours.start, 0), self._moment(day, last, 1), hours.text

    def _moment(self, day: datetime.date, minutes: int, fold: int) -> float:
        """When the clock on the wall shows so many minutes after midnight; `fold` 1: for the second time."""
        days, rest = divmod(minutes, 24 * 60)
        hour, minute = divmod(rest, 60)
        wall = datetime.time(hour, minute, fold=fold)
        found = datetime.datetime.combine(day + datetime.timedelta(days=days), wall, self._zone)
        return _outside_gap(found, fold)


def _outside_gap(wall: datetime.datetime, fold: int) -> float:
    """The moment of a wall time; of one that the clocks leave out, the moment at which they jump over it."""
    early, late = (wall.replace(fold=each).timestamp() for each in (0, 1))
    if early <= late:  # an ordinary time, or one that comes twice
        return late if fold else early
    # In a gap fold 1 is before the jump and fold 0 after it, by the width of the gap; the jump lies between.
    low, high = late, early
    zone_of = wall.tzinfo

    def shift(moment: float) -> datetime.timedelta | None:
        local = datetime.datetime.fromtimestamp(moment, zone_of)
        return (local if zone_of else local.astimezone()).utcoffset()

    before = shift(low)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if shift(middle) == before else (low, middle)
    return high


def zone(name: str) -> datetime.tzinfo | None:
    """A time zone by name; None for the machine's own. Raises ValueError with a sentence."""
    if not name:
        return None
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(
            f'"{name}" is no time zone that this machine knows: write one like "Europe/Zurich" '
            "(on Windows the package tzdata brings them)"
        ) from None


def schedule_reader(quiet: Sequence[str], time_zone: str) -> Schedule | Unknown:
    """The schedule; `Unknown` with its sentence when it cannot be understood."""
    try:
        return Schedule(quiet, time_zone)
    except ValueError as error:
        return Unknown(str(error))
