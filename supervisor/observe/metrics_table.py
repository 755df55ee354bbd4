"""Every metric of the supervisor in one table: what it is called, what it counts, in which unit, by which labels.

Names are a promise to dashboards and alerts: a test holds them, and scripts/dashboard draws only what is in here.
Base units everywhere. The GPUs' own table is supervisor/machine/gpu_metrics.py, the coordinator's families are in
coordinator/metrics.py.
"""

from __future__ import annotations

from typing import NamedTuple

PREFIX = "bulkhead_"
SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    120.0,
    300.0,
    900.0,
    3600.0,
)
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metric(NamedTuple):
    """One family.

    Attributes:
        name: without the prefix; a counter ends in `_total`, and everything with a unit in its name says it.
        unit: "" for counts and states.
        buckets: upper bounds of a histogram, in its unit.
    """

    name: str
    kind: str
    unit: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


# Counted as things happen: `observe/tally.py`.
COUNTED: tuple[Metric, ...] = (
    Metric("jobs_total", "counter", "", "Attempts that ended here.", ("kind", "model", "outcome")),
    Metric("job_faults_total", "counter", "", "Attempts that ended with a fault.", ("kind", "model", "code")),
    Metric("declines_total", "counter", "", "Offers that were declined.", ("code",)),
    Metric("job_duration_seconds", "histogram", "s", "Time of an attempt by phase.", ("kind", "phase"), SECONDS),
    Metric("time_to_first_token_seconds", "histogram", "s", "Claim to first output.", ("kind", "model"), SECONDS),
    Metric("time_per_output_token_seconds", "histogram", "s", "Between tokens after the first.", ("model",), SHORT),
    Metric("tokens_total", "counter", "", "Tokens of jobs that succeeded.", ("model", "direction")),
    Metric("audio_seconds_total", "counter", "s", "Audio heard or spoken.", ("model",)),
    Metric("images_total", "counter", "", "Images made.", ("model",)),
    Metric("frames_total", "counter", "", "Frames of video made.", ("model",)),
    Metric("characters_total", "counter", "", "Characters spoken.", ("model",)),
    Metric("documents_total", "counter", "", "Documents ranked.", ("model",)),
    Metric("engine_load_seconds", "histogram", "s", "Start of an instance to ready.", ("engine",), SECONDS),
    Metric("kill_escalations_total", "counter", "", "Instances that needed more than a word.", ("engine", "signal")),
    Metric("model_pace_ratio", "gauge", "", "Speed of the latest runs as a share of the usual.", ("model",)),
    Metric("model_spilled_bytes", "gauge", "B", "Of a model in RAM that belongs on the GPU.", ("model",)),
    Metric("reconnects_total", "counter", "", "Sessions with the coordinator after the first."),
    Metric("heartbeat_age_seconds", "gauge", "s", "Since the coordinator was last heard."),
    Metric("transfer_bytes_total", "counter", "B", "Files moved for jobs.", ("direction",)),
    Metric("config_reloads_total", "counter", "", "Times that worker.toml was read again.", ("outcome",)),
    Metric("disk_free_bytes", "gauge", "B", "Room on the disk of a folder.", ("place",)),
    Metric("disk_size_bytes", "gauge", "B", "Size of that disk.", ("place",)),
    Metric("model_cache_bytes", "gauge", "B", "Models that were pulled."),
    Metric("log_lines_total", "counter", "", "Lines of the log.", ("level",)),
    Metric("log_dropped_total", "counter", "", "Lines that did not reach a sink.", ("sink",)),
    Metric("rss_bytes", "gauge", "B", "Resident memory of the supervisor itself."),
    Metric("cpu_seconds_total", "counter", "s", "Processor time of the supervisor itself."),
    Metric("start_time_seconds", "gauge", "s", "Start of the supervisor, since the epoch."),
)

# Read off the snapshot that `status` shows: `control/metrics.py`.
SHOWN: tuple[Metric, ...] = (
    Metric("up", "gauge", "", "Whether the supervisor answers."),
    Metric("info", "gauge", "", "Which supervisor this is.", ("version", "worker", "protocol")),
    Metric("uptime_seconds", "gauge", "s", "Since it was started."),
    Metric("state", "gauge", "", "State of the worker.", ("state",)),
    Metric("hold", "gauge", "", "Reasons for not taking work.", ("source", "gpu", "kind")),
    Metric("coordinator_connected", "gauge", "", "Whether there is a session."),
    Metric("jobs_inflight", "gauge", "", "Attempts that this worker holds."),
    Metric("queue_depth", "gauge", "", "Runs that wait for an engine."),
    Metric("engine_up", "gauge", "", "Whether the model can serve.", ("model", "engine")),
    Metric("engine_state", "gauge", "", "State of the model's instance.", ("model", "engine", "state")),
    Metric("engine_jobs_running", "gauge", "", "Runs in the instance.", ("model", "engine")),
    Metric("engine_jobs_queued", "gauge", "", "Runs that wait for it.", ("model", "engine")),
    Metric("engine_restarts_total", "counter", "", "Starts after the first.", ("model", "engine")),
    Metric("engine_ends_total", "counter", "", "Ends of instances by cause.", ("model", "engine", "cause")),
    Metric("engine_rss_bytes", "gauge", "B", "Resident memory of the instance.", ("model", "engine")),
    Metric("engine_vram_bytes", "gauge", "B", "GPU memory of the instance.", ("model", "engine")),
    Metric("engine_sandbox", "gauge", "", "Verdict of each layer.", ("model", "engine", "layer", "verdict")),
)

BY_NAME = {metric.name: metric for metric in (*COUNTED, *SHOWN)}
