"""What the GPU reader says, as data: the other side of `engines/telemetry/line.py`. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import msgspec

# Reasons for lowered clocks that are no throttling: nothing to do, or what somebody asked for.
_BENIGN_REASONS = frozenset({"gpu-idle", "clocks-setting", "sync-boost", "display-clock"})


class GpuProcess(msgspec.Struct, frozen=True, kw_only=True):
    """One process that holds memory of a GPU.

    Attributes:
        pid: in the supervisor's pid namespace.
        kind: "compute" or "graphics".
        bytes: None where the driver does not tell (Windows WDDM).
    """

    pid: int
    kind: str = "compute"
    bytes: int | None = None


class MigDevice(msgspec.Struct, frozen=True, kw_only=True):
    """One slice of a GPU in MIG mode: a device of its own to CUDA, by its UUID."""

    uuid: str = ""
    name: str = ""
    memory_total_bytes: int | None = None
    memory_used_bytes: int | None = None
    memory_free_bytes: int | None = None
    memory_reserved_bytes: int | None = None
    processes: tuple[GpuProcess, ...] = ()
    missing: dict[str, str] = {}


class GpuReading(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU at one moment. None where it was not told; `missing` has the reason by field.

    Attributes:
        minor: number of its node, /dev/nvidia<minor>.
        memory_used_bytes: without what the driver reserves, where that is told.
        busy, memory_busy: share of the last sample period, 0 to 1.
        temperature_margin_c: degrees left until the GPU slows itself down.
        clock_reasons: why the clocks are not at their highest (see `throttled`).
        energy_j: since the driver was loaded.
        ecc_uncorrected, ecc_uncorrected_ever: since the last reset, and in the card's life.
        remap_pending: a reset is needed to take bad memory out of use.
        remap_failed: bad memory cannot be taken out of use any more.
        recovery_action: what the driver wants done: "none", "reset", "reboot", "drain-and-reset", …
        error: the GPU is lost or needs a reset; everything else is then unreliable.
    """

    index: int = 0
    minor: int | None = None
    uuid: str = ""
    name: str = ""
    pci: str = ""
    memory_total_bytes: int | None = None
    memory_used_bytes: int | None = None
    memory_free_bytes: int | None = None
    memory_reserved_bytes: int | None = None
    busy: float | None = None
    memory_busy: float | None = None
    temperature_c: float | None = None
    temperature_margin_c: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    energy_j: float | None = None
    clock_reasons: tuple[str, ...] = ()
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    pcie_generation: int | None = None
    pcie_width: int | None = None
    pcie_tx_bytes_s: int | None = None
    pcie_rx_bytes_s: int | None = None
    pcie_replays: int | None = None
    ecc_uncorrected: int | None = None
    ecc_uncorrected_ever: int | None = None
    remapped_corrected: int | None = None
    remapped_uncorrected: int | None = None
    remap_pending: bool | None = None
    remap_failed: bool | None = None
    retired_pages: int | None = None
    recovery_action: str = ""
    processes: tuple[GpuProcess, ...] = ()
    mig: tuple[MigDevice, ...] = ()
    error: str = ""
    missing: dict[str, str] = {}

    @property
    def throttled(self) -> tuple[str, ...]:
        """Reasons that cost speed: heat and power."""
        return tuple(reason for reason in self.clock_reasons if reason not in _BENIGN_REASONS)


Device = GpuReading | MigDevice


class Reading(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="reading"):
    """All GPUs at one moment.

    Attributes:
        asked: the highest question that was known when the reading began.
        events: why no events are to be had; "" when they are.
    """

    asked: int = 0
    driver: str = ""
    cuda: str = ""
    events: str = ""
    gpus: tuple[GpuReading, ...] = ()


class GpuEvent(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="event"):
    """Something that the driver reported in the moment it happened.

    Attributes:
        kind: "xid", "ecc-double-bit", "retirement-failure", "poison-fatal", "unavailable", "recovery-action", "lost".
        uuid: "" when the driver did not say which GPU.
        action: what the driver wants done, for "recovery-action".
    """

    kind: str
    uuid: str = ""
    xid: int | None = None
    action: str = ""
    text: str = ""


class NoGpu(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="none"):
    """There is no GPU, and this is the reader's last word."""

    error: str = ""


Spoken = Reading | GpuEvent | NoGpu
_decoder: msgspec.json.Decoder[Spoken] = msgspec.json.Decoder(Spoken)


def decode(line: bytes) -> Spoken:
    """One line of a reader. Raises msgspec.MsgspecError or UnicodeDecodeError for anything else."""
    return _decoder.decode(line)


def devices(readings: Mapping[str, GpuReading]) -> Iterator[tuple[str, Device]]:
    """Every GPU, and every MIG device of each, by UUID."""
    for uuid, gpu in readings.items():
        yield uuid, gpu
        for part in gpu.mig:
            yield part.uuid, part


def device(readings: Mapping[str, GpuReading], uuid: str) -> Device | None:
    """One GPU or MIG device; None when it is not there."""
    return next((found for name, found in devices(readings) if name == uuid), None)


def used_by(readings: Mapping[str, GpuReading], pids: Iterable[int]) -> dict[str, int]:
    """Bytes that these processes hold, by GPU (or MIG device); GPUs of which they hold nothing are left out."""
    wanted = set(pids)
    held = {
        uuid: sum(process.bytes or 0 for process in found.processes if process.pid in wanted)
        for uuid, found in devices(readings)
    }
    return {uuid: size for uuid, size in held.items() if size}


def foreign_bytes(found: Device, own_pids: Iterable[int], own_bytes: int = 0) -> int | None:
    """Bytes of a GPU that are not ours; None when it is not told what is used.

    Args:
        own_bytes: what our processes are believed to hold, for a driver that lists none of them (a container that
            hides pids, WDDM): the listed and the believed do not add up, the larger counts.
    """
    if found.memory_used_bytes is None:
        return None
    wanted = set(own_pids)
    listed = sum(process.bytes or 0 for process in found.processes if process.pid in wanted)
    return max(0, found.memory_used_bytes - max(listed, own_bytes))
