from __future__ import annotations

import logging

import pytest

from supervisor.observe.instancewatch import InstanceWatch
from supervisor.observe.tally import Tally

GIB = 2**30


@pytest.mark.parametrize(
    ("about", "words"),
    [
        (
            {"device": "cuda:0", "vram_bytes": int(4.1 * GIB), "rss_bytes": GIB},
            "chat loaded on cuda:0 in 3.2 s, 4.1 GiB",
        ),
        ({"device": "cuda:0", "rss_bytes": GIB}, "chat loaded on cuda:0 in 3.2 s, 1.0 GiB of RAM"),
        ({"device": "cuda:0"}, "chat loaded on cuda:0 in 3.2 s"),
        ({"device": "cpu", "rss_bytes": 61 * 2**20}, "chat loaded on cpu in 3.2 s, 61 MiB"),
    ],
)
def test_a_load_is_one_line_and_one_number(caplog: pytest.LogCaptureFixture, about, words) -> None:
    caplog.set_level(logging.INFO, "supervisor")
    tally = Tally(engines=["llm"])
    InstanceWatch(tally).loaded("chat", "llm", 3.2, **about)
    assert caplog.messages == [words]
    assert 'bulkhead_engine_load_seconds_sum{engine="llm"} 3.2' in tally.lines()
    assert 'bulkhead_engine_load_seconds_count{engine="llm"} 1' in tally.lines()


def test_what_was_ended_by_force_is_counted_by_the_hardest_that_was_used() -> None:
    tally = Tally(engines=["llm"])
    watch = InstanceWatch(tally)
    for force in ("SIGTERM", "SIGKILL", "SIGKILL", "unkillable"):
        watch.forced("chat", "llm", force)
    found = [line for line in tally.lines() if line.startswith("bulkhead_kill_escalations_total")]
    assert sorted(found) == [
        'bulkhead_kill_escalations_total{engine="llm",signal="SIGKILL"} 2',
        'bulkhead_kill_escalations_total{engine="llm",signal="SIGTERM"} 1',
        'bulkhead_kill_escalations_total{engine="llm",signal="unkillable"} 1',
    ]
