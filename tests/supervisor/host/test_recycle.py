"""When a healthy instance is replaced, as a table."""

from __future__ import annotations

import pytest

from supervisor.host.recycle import BASELINE_JOBS, Baseline, Reading, baseline, due
from supervisor.settings import RecycleTable

GIB = 2**30
TABLE = RecycleTable(rss_growth_gb=4, vram_growth_gb=1, after_s=3600, after_jobs=1000)


def reading(jobs: int = 10, age_s: float = 60, rss: float = 1, vram: float = 0) -> Reading:
    return Reading(jobs=jobs, age_s=age_s, rss_bytes=int(rss * GIB), vram_bytes=int(vram * GIB))


@pytest.mark.parametrize(
    ("base", "seen", "expected"),
    [
        (Baseline(GIB, GIB), reading(rss=1, vram=1), ""),
        (Baseline(GIB, GIB), reading(rss=4.9, vram=1.9), ""),
        (Baseline(GIB, GIB), reading(rss=5, vram=1), "its memory grew by 4.0 GiB since its first jobs"),
        (Baseline(GIB, GIB), reading(rss=1, vram=2.5), "its GPU memory grew by 1.5 GiB since its first jobs"),
        (None, reading(rss=50), ""),
        (Baseline(0, 0), reading(rss=50, vram=50), ""),
        (Baseline(GIB, 0), reading(jobs=1000), "it did 1000 jobs"),
        (Baseline(GIB, 0), reading(age_s=3600), "it is 3600 s old"),
        (None, reading(jobs=0, age_s=9999), ""),
    ],
)
def test_reasons(base, seen, expected):
    assert due(base, seen, TABLE) == expected


def test_a_zero_switches_a_reason_off():
    never = RecycleTable(rss_growth_gb=0, vram_growth_gb=0, after_s=0, after_jobs=0)
    assert due(Baseline(GIB, GIB), reading(jobs=10**6, age_s=10**6, rss=100, vram=100), never) == ""


def test_the_baseline_is_taken_after_the_first_jobs_and_stays():
    assert baseline(None, reading(jobs=BASELINE_JOBS - 1)) is None
    first = baseline(None, reading(jobs=BASELINE_JOBS, rss=2))
    assert first == Baseline(2 * GIB, 0)
    assert baseline(first, reading(jobs=9, rss=3)) == first
    assert baseline(first, reading(jobs=9, rss=3, vram=1)) == Baseline(2 * GIB, GIB)  # the first that was readable
