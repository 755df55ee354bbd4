"""A scripted stand-in for nvidia-ml-py: the names of the real one, with answers that each test writes."""

from __future__ import annotations

import types
from typing import Any

import pynvml as real

GIB = 2**30


class Quiet(types.ModuleType):
    """`pynvml` as a module object whose calls are attributes."""

    calls: dict[str, int]


def raising(error: type[Exception]) -> Any:
    """A call that is refused; `error` is one of the real classes."""

    def fail(*_args: Any, **_more: Any) -> None:
        raise error

    return fail


def refused(name: str) -> Any:
    """A call that is refused with the real error of this name, "NotSupported" say."""
    return raising(getattr(real, f"NVMLError_{name}"))


def some(**fields: Any) -> types.SimpleNamespace:
    return types.SimpleNamespace(**fields)


def scripted(**overrides: Any) -> Any:
    """One healthy GPU with everything told."""
    module: Any = Quiet("pynvml")
    module.NVMLError = real.NVMLError
    answers = {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlSystemGetDriverVersion": b"580.95.05",
        "nvmlSystemGetCudaDriverVersion_v2": 13000,
        "nvmlDeviceGetCount": 1,
        "nvmlDeviceGetUUID": "GPU-1",
        "nvmlDeviceGetName": b"H200",
        "nvmlDeviceGetMinorNumber": 3,
        "nvmlDeviceGetPciInfo": some(busId=b"00000000:41:00.0"),
        "nvmlDeviceGetCudaComputeCapability": (9, 0),
        "nvmlDeviceGetUtilizationRates": some(gpu=40, memory=7),
        "nvmlDeviceGetCurrentClocksEventReasons": 0x41,
        "nvmlDeviceGetPowerUsage": 250_500,
        "nvmlDeviceGetEnforcedPowerLimit": 700_000,
        "nvmlDeviceGetTotalEnergyConsumption": 9_000,
        "nvmlDeviceGetTemperatureV": 61,
        "nvmlDeviceGetMarginTemperature": 26,
        "nvmlDeviceGetRemappedRows": (1, 2, 1, 0),
        "nvmlDeviceGetCurrPcieLinkGeneration": 5,
        "nvmlDeviceGetCurrPcieLinkWidth": 16,
        "nvmlDeviceGetPcieThroughput": 10,
        "nvmlDeviceGetPcieReplayCounter": 0,
        "nvmlDeviceGetGraphicsRunningProcesses": [],
        "nvmlDeviceGetComputeRunningProcesses": [some(pid=7, usedGpuMemory=GIB)],
        "nvmlDeviceGetMigMode": [0, 0],
        "nvmlDeviceGetFieldValues": [some(nvmlReturn=0, value=some(uiVal=0))],
    }
    module.calls = {}

    def answering(name: str, answer: Any) -> Any:
        def call(*_args: Any, **_more: Any) -> Any:
            module.calls[name] = module.calls.get(name, 0) + 1
            return answer

        return call

    for name, answer in answers.items():
        setattr(module, name, answering(name, answer))
    module.nvmlMemory_v2 = 2
    module.nvmlDeviceGetHandleByIndex = lambda index: f"handle-{index}"
    module.nvmlDeviceGetMemoryInfo = lambda handle, version=None: some(
        total=24 * GIB, used=3 * GIB if version else 4 * GIB, free=20 * GIB, reserved=GIB
    )
    module.nvmlDeviceGetClockInfo = lambda handle, kind: {1: 1980, 2: 3201}[kind]
    module.nvmlDeviceGetTotalEccErrors = lambda handle, kind, counter: {0: 0, 1: 5}[counter]
    module.nvmlDeviceGetRetiredPages = lambda handle, cause: [] if cause else [4096, 8192]
    for name, value in overrides.items():
        setattr(module, name, value)
    return module
