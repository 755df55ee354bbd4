"""Counters and histograms whose size is bounded."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from coordinator import counting
from coordinator.counting import OTHER, Counters, Histogram, Tally


def test_names_beyond_the_bound_are_counted_together() -> None:
    tally: Tally[tuple[str, str]] = Tally(2)
    for n in range(5):
        tally[f"model-{n}", "done"] += 1
    tally["model-0", "done"] += 2
    assert tally == {("model-0", "done"): 3, ("model-1", "done"): 1, (OTHER, OTHER): 3}
    assert sum(tally.values()) == 7


def test_single_names_too() -> None:
    tally: Tally[str] = Tally(1)
    for name in "abca":
        tally[name] += 1
    assert tally == {"a": 2, OTHER: 2}


def test_a_histogram_counts_upwards() -> None:
    histogram = Histogram((0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 7.0):
        histogram.observe(value)
    assert list(histogram.buckets()) == [("0.1", 2), ("1", 3), ("+Inf", 4)]
    assert histogram.count == 4
    assert abs(histogram.total - 7.65) < 1e-9


def test_a_piece_of_a_stream_is_counted_by_the_seconds_that_it_was_here(monkeypatch: pytest.MonkeyPatch) -> None:
    counters = Counters()
    monkeypatch.setattr(counting, "time", SimpleNamespace(monotonic=lambda: 100.0))
    counters.written(99.75)
    counters.written(99.998)
    counters.written(0.0)  # nobody knows when it came
    assert (counters.stream_lag.count, round(counters.stream_lag.total, 6)) == (2, 0.252)
    assert dict(counters.stream_lag.buckets())["0.0025"] == 1
