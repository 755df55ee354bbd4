"""GPU readings as Prometheus text. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from supervisor.machine.gpu_health import Health, State
from supervisor.machine.readings import GpuReading

PREFIX = "bulkhead_gpu_"


class Metric(NamedTuple):
    """One family: name without prefix, type, help, and what one GPU has of it (None: left out)."""

    name: str
    kind: str
    help: str
    value: Callable[[GpuReading], float | int | None]


METRICS: tuple[Metric, ...] = (
    Metric("memory_total_bytes", "gauge", "Memory of the GPU.", lambda gpu: gpu.memory_total_bytes),
    Metric("memory_used_bytes", "gauge", "Memory in use.", lambda gpu: gpu.memory_used_bytes),
    Metric("memory_free_bytes", "gauge", "Memory that is free.", lambda gpu: gpu.memory_free_bytes),
    Metric("memory_reserved_bytes", "gauge", "Memory kept by the driver.", lambda gpu: gpu.memory_reserved_bytes),
    Metric("utilization_ratio", "gauge", "Share of time with a kernel running.", lambda gpu: gpu.busy),
    Metric("memory_utilization_ratio", "gauge", "Share of time with memory traffic.", lambda gpu: gpu.memory_busy),
    Metric("temperature_celsius", "gauge", "Temperature.", lambda gpu: gpu.temperature_c),
    Metric("temperature_margin_celsius", "gauge", "Degrees until it slows down.", lambda gpu: gpu.temperature_margin_c),
    Metric("power_watts", "gauge", "Power drawn.", lambda gpu: gpu.power_w),
    Metric("power_limit_watts", "gauge", "Power limit in force.", lambda gpu: gpu.power_limit_w),
    Metric("energy_joules_total", "counter", "Energy since the driver was loaded.", lambda gpu: gpu.energy_j),
    Metric("sm_clock_hertz", "gauge", "Clock of the processors.", lambda gpu: _mhz(gpu.sm_clock_mhz)),
    Metric("memory_clock_hertz", "gauge", "Clock of the memory.", lambda gpu: _mhz(gpu.memory_clock_mhz)),
    Metric("pcie_generation", "gauge", "PCIe generation of the link now.", lambda gpu: gpu.pcie_generation),
    Metric("pcie_width", "gauge", "PCIe lanes of the link now.", lambda gpu: gpu.pcie_width),
    Metric("pcie_transmit_bytes_per_second", "gauge", "PCIe traffic from the GPU.", lambda gpu: gpu.pcie_tx_bytes_s),
    Metric("pcie_receive_bytes_per_second", "gauge", "PCIe traffic to the GPU.", lambda gpu: gpu.pcie_rx_bytes_s),
    Metric("pcie_replays_total", "counter", "PCIe packets sent again.", lambda gpu: gpu.pcie_replays),
    Metric("ecc_uncorrected_errors", "gauge", "Uncorrected ECC errors since reset.", lambda gpu: gpu.ecc_uncorrected),
    Metric("ecc_uncorrected_errors_total", "counter", "Such errors in its life.", lambda gpu: gpu.ecc_uncorrected_ever),
    Metric("remapped_rows", "gauge", "Memory rows out of use.", lambda gpu: gpu.remapped_uncorrected),
    Metric(
        "remapped_rows_corrected", "gauge", "Such rows, after corrected errors.", lambda gpu: gpu.remapped_corrected
    ),
    Metric("remap_pending", "gauge", "Whether a reset is due for that.", lambda gpu: gpu.remap_pending),
    Metric("remap_failed", "gauge", "Whether no spare rows are left.", lambda gpu: gpu.remap_failed),
    Metric("retired_pages", "gauge", "Memory pages out of use.", lambda gpu: gpu.retired_pages),
)


def gpu_metrics(
    readings: Mapping[str, GpuReading],
    *,
    age_s: float | None = None,
    driver: str = "",
    health: Mapping[str, Health] | None = None,
    faults: Mapping[tuple[str, str], int] | None = None,
    own_pids: Iterable[int] = (),
) -> list[str]:
    """Lines of the text format, families in a fixed order; what is not known has no line.

    Args:
        age_s: age of the readings.
        health: `GpuHealth.snapshot()`.
        faults: `GpuHealth.faults`.
        own_pids: processes of engines; what others hold is "foreign".
    """
    lines: list[str] = []
    gpus = list(readings.items())
    for metric in METRICS:
        samples = [(_labels(gpu=uuid), value) for uuid, gpu in gpus if (value := metric.value(gpu)) is not None]
        lines += _family(metric.name, metric.kind, metric.help, samples)
    throttled = [(_labels(gpu=uuid, reason=reason), 1) for uuid, gpu in gpus for reason in gpu.throttled]
    lines += _family("throttled", "gauge", "Reasons that slow the GPU down now.", throttled)
    asked = [
        (_labels(gpu=uuid, action=gpu.recovery_action), 1)
        for uuid, gpu in gpus
        if gpu.recovery_action not in ("", "none")
    ]
    lines += _family("recovery_action", "gauge", "What the driver wants done with the GPU.", asked)
    own = set(own_pids)
    held = [
        (
            _labels(gpu=uuid, owner=owner),
            sum(process.bytes or 0 for process in gpu.processes if (process.pid in own) == mine),
        )
        for uuid, gpu in gpus
        if "processes" not in gpu.missing
        for owner, mine in (("own", True), ("foreign", False))
    ]
    lines += _family("process_memory_bytes", "gauge", "Memory by whose processes hold it.", held)
    names = [(_labels(gpu=uuid, index=str(gpu.index), name=gpu.name, driver=driver), 1) for uuid, gpu in gpus]
    lines += _family("info", "gauge", "What the GPU is.", names)
    states = [
        (_labels(gpu=uuid, state=state), int(found.state is state))
        for uuid, found in (health or {}).items()
        for state in State
    ]
    lines += _family("state", "gauge", "Whether the GPU may be used.", states)
    counts = [(_labels(gpu=uuid, fault=fault), count) for (uuid, fault), count in sorted((faults or {}).items())]
    lines += _family("faults_total", "counter", "Faults that the driver reported (Xid and the like).", counts)
    if age_s is not None:
        lines += _family("reading_age_seconds", "gauge", "Age of these readings.", [("", age_s)])
    return lines


def _mhz(value: int | None) -> int | None:
    return None if value is None else value * 1_000_000


def _family(name: str, kind: str, about: str, samples: Sequence[tuple[str, float | int]]) -> Iterator[str]:
    if samples:
        yield f"# HELP {PREFIX}{name} {about}"
        yield f"# TYPE {PREFIX}{name} {kind}"
    for labels, value in samples:
        yield f"{PREFIX}{name}{labels} {_number(value)}"


def _number(value: float | int) -> str:
    if isinstance(value, float):
        return "+Inf" if value == float("inf") else repr(value)
    return str(int(value))


def _labels(**labels: str) -> str:
    inner = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())
    return f"{{{inner}}}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
