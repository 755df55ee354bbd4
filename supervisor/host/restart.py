"""When an engine that ended badly may start again. Pure.

    bad end ──► fewer than `quarantine_after` in a row: pause (none after the first, then doubling, jittered)
            └─► that many: quarantine for `reprobe_s`, then a probe: failed, twice as long; passed, one load decides

A quarantine that was lifted leaves the record one bad end short of the next: the first load after it either heals
everything or sends the model back for twice as long. A job done, or `healthy_s` of life, clears the record.
"""

from __future__ import annotations

import msgspec

from supervisor.settings import RestartTable

LONGEST_QUARANTINE_S = 3600.0
_JITTER = 0.25  # pauses are spread over 1 ± this, so that boxes that fell together do not rise together


class Record(msgspec.Struct, frozen=True):
    """What is remembered of a lane: bad ends in a row, and quarantines in a row."""

    bad_ends: int = 0
    quarantines: int = 0


class Next(msgspec.Struct, frozen=True, kw_only=True):
    """What follows a bad end: a pause of so many seconds, in quarantine or not."""

    record: Record
    pause_s: float
    quarantined: bool = False


def pause_s(bad_ends: int, table: RestartTable, jitter: float) -> float:
    """Pause before the next start after `bad_ends` in a row; `jitter` in [0, 1).

    The first costs no pause: most are one bad request, and the next caller should not wait.
    """
    if bad_ends <= 1:
        return 0.0
    return _spread(_doubled(table.first_pause_s, bad_ends - 2, table.longest_pause_s), jitter)


def after_bad_end(record: Record, table: RestartTable, *, well: bool, loading: bool, jitter: float) -> Next:
    """Judge one more bad end.

    Args:
        well: before it, the instance had done a job or lived for `healthy_s`.
        loading: it never got ready. What cannot load fails everybody at once, so it pauses from the first time on.
    """
    bad_ends = 1 if well else record.bad_ends + 1
    quarantines = 0 if well else record.quarantines
    if bad_ends >= table.quarantine_after:
        return barred(Record(bad_ends, quarantines), table, jitter)
    pause = pause_s(bad_ends + loading, table, jitter)
    return Next(record=Record(bad_ends, quarantines), pause_s=pause)


def barred(record: Record, table: RestartTable, jitter: float) -> Next:
    """One more quarantine: for a crash loop, a failed probe, or a process that cannot be killed."""
    longest = max(LONGEST_QUARANTINE_S, table.reprobe_s)
    pause = _spread(_doubled(table.reprobe_s, record.quarantines, longest), jitter)
    return Next(record=Record(record.bad_ends, record.quarantines + 1), pause_s=pause, quarantined=True)


def lifted(record: Record, table: RestartTable) -> Record:
    """The record after a probe has passed."""
    return Record(table.quarantine_after - 1, record.quarantines)


def _doubled(first_s: float, times: int, longest_s: float) -> float:
    return min(first_s * 2.0 ** min(times, 64), longest_s)


def _spread(seconds: float, jitter: float) -> float:
    return seconds * (1 - _JITTER + 2 * _JITTER * jitter)
