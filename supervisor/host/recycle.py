"""When a healthy instance is replaced between two jobs. Pure.

Libraries leak, and some never give memory back; a new process is the only cure that always works. Growth is measured
from a baseline taken after the first few jobs, because buffers and caches that the first jobs fill are no leak.
"""

from __future__ import annotations

import msgspec

from supervisor.settings import RecycleTable

BASELINE_JOBS = 3
_GIB = 2**30


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """One look at an instance: jobs done, age in seconds, memory of its whole family (0: unknown)."""

    jobs: int
    age_s: float
    rss_bytes: int = 0
    vram_bytes: int = 0


class Baseline(msgspec.Struct, frozen=True):
    """The first reading after `BASELINE_JOBS` jobs; growth counts from here. A zero was not readable then."""

    rss_bytes: int = 0
    vram_bytes: int = 0


def baseline(known: Baseline | None, reading: Reading) -> Baseline | None:
    """The baseline after this reading; None while there were too few jobs."""
    if reading.jobs < BASELINE_JOBS:
        return None
    if known is None:
        return Baseline(reading.rss_bytes, reading.vram_bytes)
    # What could not be read the first time is taken the first time it can.
    return Baseline(known.rss_bytes or reading.rss_bytes, known.vram_bytes or reading.vram_bytes)


def due(base: Baseline | None, reading: Reading, table: RecycleTable) -> str:
    """Why the instance should be replaced when its runs are done; "" when it should not.

    One that has done nothing yet is as good as new, whatever its age.
    """
    if not reading.jobs:
        return ""
    if table.after_jobs and reading.jobs >= table.after_jobs:
        return f"it did {reading.jobs} job{'' if reading.jobs == 1 else 's'}"
    if table.after_s and reading.age_s >= table.after_s:
        return f"it is {reading.age_s:.0f} s old"
    if base is None:
        return ""
    grown = (
        ("memory", base.rss_bytes, reading.rss_bytes, table.rss_growth_gb),
        ("GPU memory", base.vram_bytes, reading.vram_bytes, table.vram_growth_gb),
    )
    for what, before, now, limit_gb in grown:
        if limit_gb and before and now - before >= limit_gb * _GIB:
            return f"its {what} grew by {(now - before) / _GIB:.1f} GiB since its first jobs"
    return ""
