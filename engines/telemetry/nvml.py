"""Every question to NVML about the GPUs of this machine. Needs nvidia-ml-py; imports nothing of ours.

Every field is optional: a card, a driver or a container that does not tell one costs that field alone, with the
reason in `missing`. What a card does not support is asked again only every `REMIND` readings.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

REMIND = 60
MAX_PROCESSES = 256
_CELSIUS_SENSOR = 0  # NVML_TEMPERATURE_GPU
_UNCORRECTED = 1  # NVML_MEMORY_ERROR_TYPE_UNCORRECTED
_VOLATILE, _AGGREGATE = 0, 1
_TX, _RX = 0, 1
_SM_CLOCK, _MEMORY_CLOCK = 1, 2
_SINGLE_BIT, _DOUBLE_BIT = 0, 1
_RECOVERY_ACTION_FIELD = 230  # NVML_FI_DEV_GET_GPU_RECOVERY_ACTION; nvidia-ml-py 12.560 does not name it yet
# nvml.h, nvmlDeviceGpuRecoveryAction_t
RECOVERY_ACTIONS = ("none", "reset", "reboot", "drain-p2p", "drain-and-reset", "imex", "bus-reset", "reboot")
# nvml.h, nvmlClocksEventReason*; "gpu-idle" and the settings of an operator are reasons, but no throttling.
CLOCK_REASONS = {
    0x1: "gpu-idle",
    0x2: "clocks-setting",
    0x4: "sw-power-cap",
    0x8: "hw-slowdown",
    0x10: "sync-boost",
    0x20: "sw-thermal-slowdown",
    0x40: "hw-thermal-slowdown",
    0x80: "hw-power-brake",
    0x100: "display-clock",
}
# Answers that stay the same until the driver is replaced.
_LASTING = ("NVMLError_NotSupported", "NVMLError_FunctionNotFound", "NVMLError_NoPermission")
# Answers that condemn the GPU, whatever was asked.
_FATAL = ("NVMLError_GpuIsLost", "NVMLError_ResetRequired")

Ask = Callable[[], Any]


def open_nvml() -> Any:
    """The initialised library. Raises ImportError or NVMLError."""
    nvml: Any = importlib.import_module("pynvml")  # has no type hints
    nvml.nvmlInit()
    return nvml


def text(value: Any) -> str:
    """NVML's strings are bytes in some versions."""
    return value.decode() if isinstance(value, bytes) else str(value)


def sentence(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def cuda_version(nvml: Any) -> str:
    """The highest CUDA version that the driver serves, as "12.4"."""
    version = int(nvml.nvmlSystemGetCudaDriverVersion_v2())
    return f"{version // 1000}.{version % 1000 // 10}"


def handles(nvml: Any) -> list[Any]:
    """A handle, or the error, for each GPU."""
    found = []
    for index in range(int(nvml.nvmlDeviceGetCount())):
        try:
            found.append(nvml.nvmlDeviceGetHandleByIndex(index))
        except nvml.NVMLError as error:
            found.append(error)
    return found


def gpu_once(nvml: Any, handle: Any, index: int) -> dict[str, Any]:
    """What decides which libraries fit (`supervisor.machine.gpu.Gpu`)."""
    gpu = Fields(nvml)
    gpu.put("uuid", lambda: text(nvml.nvmlDeviceGetUUID(handle)))
    gpu.put("name", lambda: text(nvml.nvmlDeviceGetName(handle)))
    gpu.put("memory_bytes", lambda: int(nvml.nvmlDeviceGetMemoryInfo(handle).total))
    gpu.put("memory_free_bytes", lambda: int(nvml.nvmlDeviceGetMemoryInfo(handle).free))
    gpu.put("compute_capability", lambda: ".".join(str(n) for n in nvml.nvmlDeviceGetCudaComputeCapability(handle)))
    return {"index": index} | gpu.found


class Fields:
    """Collects answers; what is refused goes to `missing`.

    Args:
        refused: lasting refusals of earlier readings, name -> (reason, readings left until it is asked again).
    """

    def __init__(self, nvml: Any, refused: dict[str, tuple[str, int]] | None = None) -> None:
        self._nvml = nvml
        self._refused = {} if refused is None else refused
        self.found: dict[str, Any] = {}

    def put(self, name: str, ask: Ask) -> None:
        """Ask for one field."""
        self.merge(name, lambda: {name: ask()})

    def merge(self, name: str, ask: Ask) -> None:
        """Ask one question that answers several fields; `name` is the one that goes missing."""
        reason, left = self._refused.get(name, ("", 0))
        if left:
            self._refused[name] = (reason, left - 1)
            self._miss(name, reason)
            return
        try:
            self.found.update(ask())
        except (self._nvml.NVMLError, AttributeError) as error:  # AttributeError: an older nvidia-ml-py
            kind, reason = type(error).__name__, sentence(error)
            if kind in _FATAL:
                self.found["error"] = reason
            if kind in _LASTING or isinstance(error, AttributeError):
                self._refused[name] = (reason, REMIND)
            self._miss(name, reason)

    def _miss(self, name: str, reason: str) -> None:
        self.found.setdefault("missing", {})[name] = reason


class Gpus:
    """All GPUs of the machine; `read` is one reading of each."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self.driver = text(nvml.nvmlSystemGetDriverVersion())
        self.cuda = cuda_version(nvml)
        self._gpus = [_Gpu(nvml, handle, index) for index, handle in enumerate(handles(nvml))]

    def __len__(self) -> int:
        return len(self._gpus)

    @property
    def handles(self) -> list[tuple[str, Any]]:
        """(uuid, handle) of those that have one."""
        return [(gpu.uuid, gpu.handle) for gpu in self._gpus if gpu.handle is not None]

    def read(self) -> list[dict[str, Any]]:
        """One reading of each."""
        return [gpu.read() for gpu in self._gpus]


class _Gpu:
    """One GPU with what does not change about it."""

    def __init__(self, nvml: Any, handle: Any, index: int) -> None:
        self._nvml = nvml
        self._index = index
        self._refused: dict[str, tuple[str, int]] = {}
        self._mig: dict[int, _Slice] = {}
        self.handle = None if isinstance(handle, Exception) else handle
        self._fixed: dict[str, Any] = {"index": index}
        self.uuid = ""
        if isinstance(handle, Exception):
            self._fixed["error"] = sentence(handle)
            return
        fixed = Fields(nvml)
        fixed.put("uuid", lambda: text(nvml.nvmlDeviceGetUUID(handle)))
        fixed.put("name", lambda: text(nvml.nvmlDeviceGetName(handle)))
        fixed.put("minor", lambda: int(nvml.nvmlDeviceGetMinorNumber(handle)))
        fixed.put("pci", lambda: text(nvml.nvmlDeviceGetPciInfo(handle).busId))
        self._fixed |= fixed.found
        self.uuid = str(fixed.found.get("uuid", ""))

    def read(self) -> dict[str, Any]:
        """Everything that changes, once."""
        if self.handle is None:
            return self._fixed
        fields = Fields(self._nvml, self._refused)
        _load(self._nvml, self.handle, fields)
        _health(self._nvml, self.handle, fields)
        _bus(self._nvml, self.handle, fields)
        fields.put("processes", lambda: processes(self._nvml, self.handle))
        fields.put("mig", self._slices)
        missing = self._fixed.get("missing", {}) | fields.found.get("missing", {})
        return self._fixed | fields.found | ({"missing": missing} if missing else {})

    def _slices(self) -> list[dict[str, Any]]:
        """The MIG devices, empty where the mode is off. They come and go while we run."""
        nvml = self._nvml
        if not nvml.nvmlDeviceGetMigMode(self.handle)[0]:
            return []
        found = []
        for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(self.handle)):
            try:
                handle = nvml.nvmlDeviceGetMigDeviceHandleByIndex(self.handle, number)
            except nvml.NVMLError:
                continue  # the numbers have gaps
            found.append(self._mig.setdefault(number, _Slice(nvml)).read(handle))
        return found


class _Slice:
    """One MIG device: memory and processes are its own, the rest belongs to the whole GPU."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self._refused: dict[str, tuple[str, int]] = {}

    def read(self, handle: Any) -> dict[str, Any]:
        """Its identity, memory and processes."""
        nvml, fields = self._nvml, Fields(self._nvml, self._refused)
        fields.put("uuid", lambda: text(nvml.nvmlDeviceGetUUID(handle)))
        fields.put("name", lambda: text(nvml.nvmlDeviceGetName(handle)))
        fields.merge("memory_total_bytes", lambda: memory(nvml, handle))
        fields.put("processes", lambda: processes(nvml, handle))
        return fields.found


def memory(nvml: Any, handle: Any) -> dict[str, int]:
    """Total, used, free, and what the driver keeps for itself where it tells (version 2 of the structure).

    In version 1 `used` contains what is reserved, in version 2 it does not.
    """
    try:
        info = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
        reserved = {"memory_reserved_bytes": int(info.reserved)}
    except (nvml.NVMLError, AttributeError) as error:
        if type(error).__name__ in _FATAL:
            raise
        info, reserved = nvml.nvmlDeviceGetMemoryInfo(handle), {}
    used = {"memory_used_bytes": int(info.used), "memory_free_bytes": int(info.free)}
    return {"memory_total_bytes": int(info.total)} | used | reserved


def processes(nvml: Any, handle: Any) -> list[dict[str, Any]]:
    """Who holds memory: the largest `MAX_PROCESSES`. No `bytes` where the driver keeps it (Windows WDDM)."""
    held: dict[int, dict[str, Any]] = {}
    lists = (
        ("graphics", nvml.nvmlDeviceGetGraphicsRunningProcesses),
        ("compute", nvml.nvmlDeviceGetComputeRunningProcesses),
    )
    for kind, ask in lists:
        for one in ask(handle):
            entry: dict[str, Any] = {"pid": int(one.pid), "kind": kind}
            if one.usedGpuMemory is not None:
                entry["bytes"] = int(one.usedGpuMemory)
            held[entry["pid"]] = entry  # one that does both has the same bytes in both lists
    return sorted(held.values(), key=lambda entry: -entry.get("bytes", 0))[:MAX_PROCESSES]


def clock_reasons(mask: int) -> list[str]:
    """Names of the set bits; one that has no name yet is shown by its number."""
    bits = (1 << position for position in range(64))
    return [CLOCK_REASONS.get(bit, f"0x{bit:x}") for bit in bits if mask & bit]


def recovery_action(number: int) -> str:
    """What the driver wants done with the GPU."""
    return RECOVERY_ACTIONS[number] if 0 <= number < len(RECOVERY_ACTIONS) else f"action-{number}"


def _load(nvml: Any, handle: Any, fields: Fields) -> None:
    def utilisation() -> dict[str, float]:
        rates = nvml.nvmlDeviceGetUtilizationRates(handle)
        return {"busy": rates.gpu / 100, "memory_busy": rates.memory / 100}

    def reasons() -> list[str]:
        ask = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
        try:
            return clock_reasons(int((ask or nvml.nvmlDeviceGetCurrentClocksThrottleReasons)(handle)))
        except nvml.NVMLError as error:
            if ask is None or type(error).__name__ != "NVMLError_FunctionNotFound":
                raise
            return clock_reasons(int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)))

    fields.merge("memory_total_bytes", lambda: memory(nvml, handle))
    fields.merge("busy", utilisation)
    fields.put("clock_reasons", reasons)
    fields.put("sm_clock_mhz", lambda: int(nvml.nvmlDeviceGetClockInfo(handle, _SM_CLOCK)))
    fields.put("memory_clock_mhz", lambda: int(nvml.nvmlDeviceGetClockInfo(handle, _MEMORY_CLOCK)))
    fields.put("power_w", lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000)
    fields.put("power_limit_w", lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000)
    fields.put("energy_j", lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000)


def _health(nvml: Any, handle: Any, fields: Fields) -> None:
    def celsius() -> float:
        if hasattr(nvml, "nvmlDeviceGetTemperatureV"):
            try:
                return float(nvml.nvmlDeviceGetTemperatureV(handle, _CELSIUS_SENSOR))
            except nvml.NVMLError as error:
                if type(error).__name__ not in _LASTING:
                    raise
        return float(nvml.nvmlDeviceGetTemperature(handle, _CELSIUS_SENSOR))

    def ecc(counter: int) -> int:
        return int(nvml.nvmlDeviceGetTotalEccErrors(handle, _UNCORRECTED, counter))

    def rows() -> dict[str, Any]:
        corrected, uncorrected, pending, failed = nvml.nvmlDeviceGetRemappedRows(handle)
        counts = {"remapped_corrected": int(corrected), "remapped_uncorrected": int(uncorrected)}
        return counts | {"remap_pending": bool(pending), "remap_failed": bool(failed)}

    def recovery() -> str:
        (value,) = nvml.nvmlDeviceGetFieldValues(handle, [_RECOVERY_ACTION_FIELD])
        if value.nvmlReturn:
            raise nvml.NVMLError(value.nvmlReturn)
        return recovery_action(int(value.value.uiVal))

    fields.put("temperature_c", celsius)
    fields.put("temperature_margin_c", lambda: float(nvml.nvmlDeviceGetMarginTemperature(handle)))
    fields.put("ecc_uncorrected", lambda: ecc(_VOLATILE))
    fields.put("ecc_uncorrected_ever", lambda: ecc(_AGGREGATE))
    fields.merge("remapped_uncorrected", rows)
    fields.put(
        "retired_pages", lambda: _count(nvml.nvmlDeviceGetRetiredPages(handle, c) for c in (_SINGLE_BIT, _DOUBLE_BIT))
    )
    fields.put("recovery_action", recovery)


def _bus(nvml: Any, handle: Any, fields: Fields) -> None:
    def throughput(direction: int) -> int:
        return int(nvml.nvmlDeviceGetPcieThroughput(handle, direction)) * 1024  # told in KiB/s, over 20 ms

    fields.put("pcie_generation", lambda: int(nvml.nvmlDeviceGetCurrPcieLinkGeneration(handle)))
    fields.put("pcie_width", lambda: int(nvml.nvmlDeviceGetCurrPcieLinkWidth(handle)))
    fields.put("pcie_tx_bytes_s", lambda: throughput(_TX))
    fields.put("pcie_rx_bytes_s", lambda: throughput(_RX))
    fields.put("pcie_replays", lambda: int(nvml.nvmlDeviceGetPcieReplayCounter(handle)))


def _count(lists: Iterable[Any]) -> int:
    return sum(len(one) for one in lists)
