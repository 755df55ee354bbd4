"""Questions to NVML against a scripted one: every field is optional, and a refusal costs that field alone."""

from __future__ import annotations

import json

import msgspec
import pytest

from engines.telemetry import nvml as asking
from supervisor.machine.readings import GpuReading

GIB = 2**30


def read(module, times: int = 1):
    gpus = asking.Gpus(module)
    for _ in range(times):
        found = gpus.read()
    return found


def decoded(gpu) -> GpuReading:
    return msgspec.json.decode(json.dumps(gpu), type=GpuReading)


def test_everything_that_nvml_tells_arrives_with_our_units(nvml):
    (gpu,) = read(nvml.scripted())
    seen = decoded(gpu)
    assert seen.missing == {}
    assert (seen.uuid, seen.name, seen.minor, seen.pci) == ("GPU-1", "H200", 3, "00000000:41:00.0")
    assert (seen.memory_total_bytes, seen.memory_used_bytes) == (24 * GIB, 3 * GIB)
    assert (seen.memory_free_bytes, seen.memory_reserved_bytes) == (20 * GIB, GIB)
    assert (seen.busy, seen.memory_busy, seen.temperature_c, seen.temperature_margin_c) == (0.4, 0.07, 61, 26)
    assert (seen.power_w, seen.power_limit_w, seen.energy_j) == (250.5, 700.0, 9.0)
    assert (seen.sm_clock_mhz, seen.memory_clock_mhz) == (1980, 3201)
    assert seen.clock_reasons == ("gpu-idle", "hw-thermal-slowdown")
    assert seen.throttled == ("hw-thermal-slowdown",)
    assert (seen.pcie_generation, seen.pcie_width, seen.pcie_tx_bytes_s, seen.pcie_replays) == (5, 16, 10240, 0)
    assert (seen.ecc_uncorrected, seen.ecc_uncorrected_ever) == (0, 5)
    assert (seen.remapped_corrected, seen.remapped_uncorrected) == (1, 2)
    assert (seen.remap_pending, seen.remap_failed) == (True, False)
    assert (seen.retired_pages, seen.recovery_action) == (2, "none")
    assert [(process.pid, process.bytes, process.kind) for process in seen.processes] == [(7, GIB, "compute")]


def test_no_field_of_the_struct_is_forgotten_by_the_reader(nvml):
    (gpu,) = read(nvml.scripted())
    assert set(gpu) == set(GpuReading.__struct_fields__) - {"missing", "error"}


ASKED_ONCE = ("UUID", "Name", "MinorNumber", "PciInfo")
ASKED_EACH_TIME = (
    "UtilizationRates ClockInfo PowerUsage EnforcedPowerLimit TotalEnergyConsumption MarginTemperature "
    "TotalEccErrors RemappedRows RetiredPages CurrPcieLinkGeneration CurrPcieLinkWidth PcieThroughput "
    "PcieReplayCounter GraphicsRunningProcesses ComputeRunningProcesses MigMode FieldValues MemoryInfo "
    "TemperatureV CurrentClocksEventReasons"
).split()


@pytest.mark.parametrize("name", [*ASKED_ONCE, *ASKED_EACH_TIME])
@pytest.mark.parametrize("error", ["NotSupported", "Unknown", "NoPermission"])
def test_any_question_may_be_refused_and_the_rest_is_still_told(nvml, name, error):
    module = nvml.scripted(**{f"nvmlDeviceGet{name}": nvml.refused(error)})
    if name == "TemperatureV":
        module.nvmlDeviceGetTemperature = nvml.refused(error)
    seen = decoded(read(module)[0])
    told = [field for field in GpuReading.__struct_fields__ if getattr(seen, field) not in (None, "", (), {})]
    assert len(told) >= 20
    assert seen.missing
    assert all(f"NVMLError_{error}" in reason for reason in seen.missing.values())


def test_an_old_package_without_a_call_costs_that_field(nvml):
    module = nvml.scripted()
    del module.nvmlDeviceGetMarginTemperature
    seen = decoded(read(module)[0])
    assert seen.temperature_margin_c is None
    assert "nvmlDeviceGetMarginTemperature" in seen.missing["temperature_margin_c"]
    assert seen.temperature_c == 61


def test_without_the_second_version_of_the_memory_structure_the_first_is_taken(nvml):
    def memory(_handle, version=None):
        if version:
            raise __import__("pynvml").NVMLError_FunctionNotFound
        return nvml.some(total=24 * GIB, used=4 * GIB, free=20 * GIB)

    seen = decoded(read(nvml.scripted(nvmlDeviceGetMemoryInfo=memory))[0])
    assert (seen.memory_used_bytes, seen.memory_reserved_bytes) == (4 * GIB, None)


def test_older_drivers_are_asked_by_the_older_names(nvml):
    module = nvml.scripted(
        nvmlDeviceGetTemperatureV=nvml.refused("FunctionNotFound"),
        nvmlDeviceGetTemperature=lambda handle, sensor: 55,
        nvmlDeviceGetCurrentClocksEventReasons=nvml.refused("FunctionNotFound"),
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0x4,
    )
    seen = decoded(read(module)[0])
    assert seen.temperature_c == 55
    assert seen.clock_reasons == ("sw-power-cap",)


def test_what_a_card_does_not_have_is_not_asked_every_second(nvml):
    asked = []

    def margin(_handle):
        asked.append(1)
        raise __import__("pynvml").NVMLError_NotSupported

    seen = decoded(read(nvml.scripted(nvmlDeviceGetMarginTemperature=margin), times=asking.REMIND + 1)[0])
    assert len(asked) == 1
    assert "NotSupported" in seen.missing["temperature_margin_c"]


def test_what_fails_for_a_moment_is_asked_again(nvml):
    asked = []

    def margin(_handle):
        asked.append(1)
        raise __import__("pynvml").NVMLError_Unknown

    read(nvml.scripted(nvmlDeviceGetMarginTemperature=margin), times=3)
    assert len(asked) == 3


@pytest.mark.parametrize("name", ["GpuIsLost", "ResetRequired"])
def test_a_lost_gpu_is_told_as_such_and_keeps_its_identity(nvml, name):
    module = nvml.scripted()
    gpus = asking.Gpus(module)
    module.nvmlDeviceGetMemoryInfo = nvml.refused(name)
    seen = decoded(gpus.read()[0])
    assert name in seen.error
    assert seen.uuid == "GPU-1"
    assert seen.memory_free_bytes is None


def test_one_gpu_without_a_handle_does_not_hide_the_others(nvml):
    def by_index(index):
        if index == 0:
            raise __import__("pynvml").NVMLError_GpuIsLost
        return "handle-1"

    module = nvml.scripted(nvmlDeviceGetCount=lambda: 2, nvmlDeviceGetHandleByIndex=by_index)
    gpus = asking.Gpus(module)
    lost, well = (decoded(gpu) for gpu in gpus.read())
    assert "GpuIsLost" in lost.error
    assert well.uuid == "GPU-1"
    assert gpus.handles == [("GPU-1", "handle-1")]


def test_processes_are_listed_once_and_those_without_a_size_too(nvml):
    module = nvml.scripted(
        nvmlDeviceGetGraphicsRunningProcesses=lambda handle: [
            nvml.some(pid=7, usedGpuMemory=5),
            nvml.some(pid=8, usedGpuMemory=None),
        ],
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [
            nvml.some(pid=7, usedGpuMemory=5),
            nvml.some(pid=9, usedGpuMemory=6),
        ],
    )
    seen = decoded(read(module)[0])
    assert [(process.pid, process.bytes) for process in seen.processes] == [(9, 6), (7, 5), (8, None)]


def test_of_very_many_processes_the_largest_are_listed(nvml):
    many = [nvml.some(pid=pid, usedGpuMemory=pid) for pid in range(1, 1000)]
    (gpu,) = read(nvml.scripted(nvmlDeviceGetComputeRunningProcesses=lambda handle: many))
    assert len(gpu["processes"]) == asking.MAX_PROCESSES
    assert gpu["processes"][0]["pid"] == 999


def test_mig_devices_have_memory_and_processes_of_their_own(nvml):
    def mig(_handle, number):
        if number == 1:
            raise __import__("pynvml").NVMLError_NotFound
        return f"mig-{number}"

    module = nvml.scripted(
        nvmlDeviceGetMigMode=lambda handle: [1, 1],
        nvmlDeviceGetMaxMigDeviceCount=lambda handle: 3,
        nvmlDeviceGetMigDeviceHandleByIndex=mig,
        nvmlDeviceGetUUID=lambda handle: f"MIG-{handle}" if handle.startswith("mig") else "GPU-1",
    )
    seen = decoded(read(module)[0])
    assert [part.uuid for part in seen.mig] == ["MIG-mig-0", "MIG-mig-2"]
    assert seen.mig[0].memory_free_bytes == 20 * GIB
    assert seen.mig[0].processes[0].pid == 7


@pytest.mark.parametrize(
    ("number", "name"),
    [(0, "none"), (1, "reset"), (2, "reboot"), (4, "drain-and-reset"), (7, "reboot"), (99, "action-99")],
)
def test_recovery_actions_have_names(number, name):
    assert asking.recovery_action(number) == name


def test_a_recovery_action_that_cannot_be_read_is_missing(nvml):
    module = nvml.scripted(nvmlDeviceGetFieldValues=lambda handle, ids: [nvml.some(nvmlReturn=3, value=None)])
    seen = decoded(read(module)[0])
    assert seen.recovery_action == ""
    assert "NotSupported" in seen.missing["recovery_action"]


def test_unnamed_clock_reasons_are_shown_by_number():
    assert asking.clock_reasons(0x4 | 0x800) == ["sw-power-cap", "0x800"]
