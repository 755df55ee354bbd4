"""The text of a scrape."""

from __future__ import annotations

import re

from protocol.revision import LINK_WIRE
from supervisor.control.metrics import metrics
from supervisor.control.snapshot import Link, ModelView, Snapshot
from supervisor.intake.holds import Hold, Source

LINE = re.compile(r'^[a-z_]+(\{([a-z_]+="([^"\\\n]|\\["\\n])*",?)*\})? [-+0-9.e]+$')

FULL = Snapshot(
    version="1.2",
    worker='a "box"\n',
    state="paused",
    uptime_s=1.5,
    link=Link(connected=True),
    jobs=2,
    holds=(Hold(source=Source.OPERATOR, since=0),),
    models=(
        ModelView(
            name="m",
            engine="llm",
            state="busy",
            running=1,
            queued=3,
            restarts=4,
            rss_bytes=5,
            vram_bytes=6,
            sandbox={"seccomp": "verified"},
            ends={"crashed": 2, "evicted": 1},
        ),
        ModelView(name="q", engine="tts", state="quarantined"),
    ),
)


def test_every_line_is_well_formed():
    for line in metrics(FULL).splitlines():
        assert line.startswith(("# HELP ", "# TYPE ")) or LINE.match(line), line


def test_what_is_told():
    lines = metrics(FULL).splitlines()
    for line in (
        "bulkhead_up 1",
        f'bulkhead_info{{version="1.2",worker="a \\"box\\"\\n",protocol="{LINK_WIRE.high}"}} 1',
        "bulkhead_uptime_seconds 1.5",
        'bulkhead_state{state="paused"} 1',
        'bulkhead_state{state="idle"} 0',
        'bulkhead_hold{source="operator",gpu="",kind=""} 1',
        "bulkhead_coordinator_connected 1",
        "bulkhead_jobs_inflight 2",
        "bulkhead_queue_depth 3",
        'bulkhead_engine_up{model="m",engine="llm"} 1',
        'bulkhead_engine_up{model="q",engine="tts"} 0',
        'bulkhead_engine_state{model="m",engine="llm",state="busy"} 1',
        'bulkhead_engine_restarts_total{model="m",engine="llm"} 4',
        'bulkhead_engine_ends_total{model="m",engine="llm",cause="crashed"} 2',
        'bulkhead_engine_rss_bytes{model="m",engine="llm"} 5',
        'bulkhead_engine_vram_bytes{model="m",engine="llm"} 6',
        'bulkhead_engine_sandbox{model="m",engine="llm",layer="seccomp",verdict="verified"} 1',
        'bulkhead_engine_jobs_queued{model="m",engine="llm"} 3',
    ):
        assert line in lines


def test_each_family_is_described_once_and_none_without_samples():
    lines = metrics(Snapshot(version="1"), ["bulkhead_gpu_x 1"]).splitlines()
    types = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(types) == len(set(types))
    assert "bulkhead_hold" not in types
    assert lines[-1] == "bulkhead_gpu_x 1"


def test_no_series_is_there_twice_however_many_holds_a_source_has():
    holds = (
        Hold(source=Source.OPERATOR, since=0),
        Hold(source=Source.OPERATOR, since=0, gpu="GPU-1"),
        Hold(source=Source.OPERATOR, since=0, gpu="GPU-2"),
        Hold(source=Source.OPERATOR, since=0, gpu="GPU-2", kind="llm"),
    )
    lines = [line for line in metrics(Snapshot(version="1", holds=holds)).splitlines() if not line.startswith("#")]
    series = [line.rpartition(" ")[0] for line in lines]
    assert len(series) == len(set(series))
    assert sum(each.startswith("bulkhead_hold{") for each in series) == 4
