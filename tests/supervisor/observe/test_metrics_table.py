"""Names are a promise to dashboards and alerts: whoever changes one, changes this list on purpose."""

from __future__ import annotations

import re

from supervisor.control.metrics import PREFIX as SHOWN_PREFIX
from supervisor.control.metrics import metrics
from supervisor.control.snapshot import GpuView, Link, ModelView, Snapshot
from supervisor.intake.holds import Hold, Source
from supervisor.observe.metrics_table import COUNTED, PREFIX, SHOWN

NAMES = """
audio_seconds_total characters_total config_reloads_total cpu_seconds_total declines_total disk_free_bytes
disk_size_bytes documents_total engine_load_seconds frames_total heartbeat_age_seconds images_total
job_duration_seconds job_faults_total jobs_total kill_escalations_total log_dropped_total log_lines_total
model_cache_bytes model_pace_ratio model_spilled_bytes reconnects_total rss_bytes start_time_seconds
time_per_output_token_seconds time_to_first_token_seconds tokens_total transfer_bytes_total
""".split()

SNAPSHOT = Snapshot(
    version="1",
    link=Link(connected=True),
    holds=(Hold(source=Source.OPERATOR, since=0),),
    gpus=(GpuView(uuid="GPU-1"),),
    models=(ModelView(name="m", engine="e", state="ready", sandbox={"seccomp": "verified"}, ends={"hung": 1}),),
)


def test_names_are_the_promised_ones() -> None:
    assert sorted(metric.name for metric in COUNTED) == NAMES


def test_every_row_keeps_the_rules_of_prometheus() -> None:
    for metric in (*COUNTED, *SHOWN):
        assert re.fullmatch(r"[a-z][a-z0-9_]*", metric.name)
        assert metric.kind in ("counter", "gauge", "histogram")
        assert (metric.kind == "counter") == metric.name.endswith("_total"), metric.name
        assert (metric.kind == "histogram") == bool(metric.buckets), metric.name
        assert list(metric.buckets) == sorted(set(metric.buckets))
        assert metric.help.endswith(".")
        word = {"s": "seconds", "B": "bytes", "": ""}[metric.unit]
        assert word in metric.name
        assert not set(metric.labels) & {"le", "quantile", "job", "instance"}, "Prometheus' own"
    every = [metric.name for metric in (*COUNTED, *SHOWN)]
    assert len(every) == len(set(every))


def test_what_the_table_says_of_the_snapshot_is_what_is_shown_and_nothing_clashes() -> None:
    text = metrics(SNAPSHOT)
    kinds = {line.split()[2]: line.split()[3] for line in text.splitlines() if line.startswith("# TYPE")}
    assert SHOWN_PREFIX == PREFIX
    for metric in SHOWN:
        name = PREFIX + metric.name
        assert kinds[name] == metric.kind
        shown = {
            frozenset(re.findall(r'(\w+)="', line)) for line in text.splitlines() if re.match(rf"{name}[{{ ]", line)
        }
        assert shown == {frozenset(metric.labels)}, name
    assert not {PREFIX + metric.name for metric in COUNTED} & set(kinds)
