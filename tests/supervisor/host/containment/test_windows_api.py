"""Layouts as Windows has them on 64 bits (winnt.h), the same on every machine that runs this."""

from __future__ import annotations

import ctypes
import struct
import sys

import pytest

from supervisor.host.containment import windows_api as api

pytestmark = pytest.mark.skipif(struct.calcsize("P") != 8, reason="layouts of 64 bits")


@pytest.mark.parametrize(
    ("structure", "size"),
    [
        (api.BasicLimits, 64),
        (api.IoCounters, 48),
        (api.ExtendedLimits, 144),
        (api.UiRestrictions, 4),
        (api.Accounting, 48),
    ],
)
def test_sizes(structure: type[ctypes.Structure], size: int):
    assert ctypes.sizeof(structure) == size


@pytest.mark.parametrize(
    ("structure", "field", "offset"),
    [
        (api.BasicLimits, "PerJobUserTimeLimit", 8),
        (api.BasicLimits, "LimitFlags", 16),
        (api.BasicLimits, "MinimumWorkingSetSize", 24),
        (api.BasicLimits, "MaximumWorkingSetSize", 32),
        (api.BasicLimits, "ActiveProcessLimit", 40),
        (api.BasicLimits, "Affinity", 48),
        (api.BasicLimits, "PriorityClass", 56),
        (api.BasicLimits, "SchedulingClass", 60),
        (api.ExtendedLimits, "IoInfo", 64),
        (api.ExtendedLimits, "ProcessMemoryLimit", 112),
        (api.ExtendedLimits, "JobMemoryLimit", 120),
        (api.ExtendedLimits, "PeakProcessMemoryUsed", 128),
        (api.ExtendedLimits, "PeakJobMemoryUsed", 136),
        (api.Accounting, "TotalPageFaultCount", 32),
        (api.Accounting, "ActiveProcesses", 40),
    ],
)
def test_offsets(structure: type[ctypes.Structure], field: str, offset: int):
    assert getattr(structure, field).offset == offset


def test_a_child_inherits_its_three_handles_and_no_other():
    found = api.startup_info(1, 2, 3)
    assert (found.hStdInput, found.hStdOutput, found.hStdError) == (1, 2, 3)
    assert found.lpAttributeList == {"handle_list": [1, 2, 3]}
    assert found.dwFlags == 0x100


def test_every_handle_is_passed_with_its_whole_width():
    """Without a prototype ctypes passes ints of 32 bits; a handle then loses its upper half on some days."""
    for name, (result, arguments) in api._PROTOTYPES.items():
        if name == "CreateJobObjectW":
            assert ctypes.sizeof(result) == 8
        if name not in ("GenerateConsoleCtrlEvent", "GetConsoleProcessList"):
            assert ctypes.sizeof(arguments[0]) == 8, name


@pytest.mark.skipif(sys.platform == "win32", reason="there it can be made")
def test_elsewhere_there_is_no_kernel32():
    with pytest.raises(OSError, match="no kernel32"):
        api.Kernel32()
