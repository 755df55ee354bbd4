"""Prometheus lines of GPU readings."""

from __future__ import annotations

import re

from supervisor.machine.gpu_health import Health, State
from supervisor.machine.gpu_metrics import METRICS, gpu_metrics
from supervisor.machine.readings import GpuProcess, GpuReading

READINGS = {
    "GPU-1": GpuReading(
        uuid="GPU-1",
        name='A "quoted" \\ name',
        memory_total_bytes=100,
        memory_used_bytes=60,
        busy=0.25,
        sm_clock_mhz=1980,
        remap_pending=False,
        clock_reasons=("gpu-idle", "hw-thermal-slowdown"),
        processes=(GpuProcess(pid=1, bytes=10), GpuProcess(pid=2, bytes=20)),
    ),
    "GPU-2": GpuReading(uuid="GPU-2", index=1, memory_total_bytes=200, missing={"processes": "NotSupported"}),
}
LINE = re.compile(r'bulkhead_gpu_[a-z_]+(\{([a-z]+="(\\.|[^"\\])*",?)+\})? (-?[0-9.e+-]+|\+Inf)')


def test_known_values_have_lines_and_unknown_ones_have_none():
    lines = gpu_metrics(READINGS, driver="580", own_pids=[1], age_s=0.5)
    assert 'bulkhead_gpu_memory_total_bytes{gpu="GPU-1"} 100' in lines
    assert 'bulkhead_gpu_memory_total_bytes{gpu="GPU-2"} 200' in lines
    assert 'bulkhead_gpu_memory_used_bytes{gpu="GPU-1"} 60' in lines
    assert not any(line.startswith('bulkhead_gpu_memory_used_bytes{gpu="GPU-2"}') for line in lines)
    assert 'bulkhead_gpu_utilization_ratio{gpu="GPU-1"} 0.25' in lines
    assert 'bulkhead_gpu_sm_clock_hertz{gpu="GPU-1"} 1980000000' in lines
    assert 'bulkhead_gpu_remap_pending{gpu="GPU-1"} 0' in lines
    assert [line for line in lines if "throttled{" in line] == [
        'bulkhead_gpu_throttled{gpu="GPU-1",reason="hw-thermal-slowdown"} 1'
    ]
    assert 'bulkhead_gpu_process_memory_bytes{gpu="GPU-1",owner="own"} 10' in lines
    assert 'bulkhead_gpu_process_memory_bytes{gpu="GPU-1",owner="foreign"} 20' in lines
    assert not any("process_memory" in line and "GPU-2" in line for line in lines)
    assert "bulkhead_gpu_reading_age_seconds 0.5" in lines


def test_what_the_driver_wants_done_is_told_where_it_wants_something():
    readings = {
        "GPU-1": GpuReading(uuid="GPU-1", recovery_action="drain-and-reset", remapped_corrected=3),
        "GPU-2": GpuReading(uuid="GPU-2", recovery_action="none"),
    }
    lines = gpu_metrics(readings)
    assert [line for line in lines if line.startswith("bulkhead_gpu_recovery_action{")] == [
        'bulkhead_gpu_recovery_action{gpu="GPU-1",action="drain-and-reset"} 1'
    ]
    assert 'bulkhead_gpu_remapped_rows_corrected{gpu="GPU-1"} 3' in lines


def test_states_and_faults():
    health = {"GPU-1": Health(state=State.QUARANTINED, reason="x")}
    lines = gpu_metrics({}, health=health, faults={("GPU-1", "xid-79"): 2})
    assert 'bulkhead_gpu_state{gpu="GPU-1",state="quarantined"} 1' in lines
    assert 'bulkhead_gpu_state{gpu="GPU-1",state="healthy"} 0' in lines
    assert 'bulkhead_gpu_faults_total{gpu="GPU-1",fault="xid-79"} 2' in lines


def test_every_line_is_of_the_text_format_and_every_family_is_introduced_once():
    lines = gpu_metrics(READINGS, age_s=float("inf"), health={"GPU-1": Health()}, faults={("", "lost"): 1})
    assert all(line.startswith("# ") or LINE.fullmatch(line) for line in lines), lines
    introduced = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(introduced) == len(set(introduced))
    assert {re.split(r"[{ ]", line)[0] for line in lines if not line.startswith("#")} == set(introduced)


def test_nothing_known_says_nothing():
    assert gpu_metrics({}) == []


def test_counters_end_in_total_and_gauges_do_not():
    assert all((metric.kind == "counter") == metric.name.endswith("_total") for metric in METRICS)
