"""The Windows calls that children need, each a few lines over ctypes; structures with their 64-bit layout.

The structures use types of fixed size, never `ctypes.wintypes`, whose DWORD is eight bytes wide on Linux: so their
layout is the same, and testable, everywhere. `Kernel32` can be made on Windows only; job.py and windows.py take it
as a parameter, and tests give them one that only keeps books.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

# ---- job objects (winnt.h)

INFO_BASIC_ACCOUNTING = 1
INFO_BASIC_UI_RESTRICTIONS = 4
INFO_EXTENDED_LIMIT = 9

LIMIT_ACTIVE_PROCESS = 0x0008
LIMIT_JOB_MEMORY = 0x0200
LIMIT_DIE_ON_UNHANDLED_EXCEPTION = 0x0400
LIMIT_BREAKAWAY_OK = 0x0800
LIMIT_SILENT_BREAKAWAY_OK = 0x1000
LIMIT_KILL_ON_JOB_CLOSE = 0x2000

# Handles of others' windows, both ways of the clipboard, system parameters, display settings, global atoms, desktops,
# and shutting Windows down.
UI_ALL = 0xFF

# ---- processes (winbase.h)

CREATE_SUSPENDED = 0x0000_0004
CREATE_NEW_PROCESS_GROUP = 0x0000_0200
CREATE_NO_WINDOW = 0x0800_0000
STARTF_USESTDHANDLES = 0x100
CTRL_BREAK_EVENT = 1
CURRENT_PROCESS = -1  # a pseudo handle
STILL_ACTIVE = 259


class BasicLimits(ctypes.Structure):
    """JOBOBJECT_BASIC_LIMIT_INFORMATION."""

    _fields_ = (
        ("PerProcessUserTimeLimit", ctypes.c_int64),
        ("PerJobUserTimeLimit", ctypes.c_int64),
        ("LimitFlags", ctypes.c_uint32),
        ("MinimumWorkingSetSize", ctypes.c_size_t),
        ("MaximumWorkingSetSize", ctypes.c_size_t),
        ("ActiveProcessLimit", ctypes.c_uint32),
        ("Affinity", ctypes.c_size_t),
        ("PriorityClass", ctypes.c_uint32),
        ("SchedulingClass", ctypes.c_uint32),
    )


class IoCounters(ctypes.Structure):
    """IO_COUNTERS."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            "ReadOperationCount",
            "WriteOperationCount",
            "OtherOperationCount",
            "ReadTransferCount",
            "WriteTransferCount",
            "OtherTransferCount",
        )
    )


class ExtendedLimits(ctypes.Structure):
    """JOBOBJECT_EXTENDED_LIMIT_INFORMATION."""

    _fields_ = (
        ("BasicLimitInformation", BasicLimits),
        ("IoInfo", IoCounters),
        ("ProcessMemoryLimit", ctypes.c_size_t),
        ("JobMemoryLimit", ctypes.c_size_t),
        ("PeakProcessMemoryUsed", ctypes.c_size_t),
        ("PeakJobMemoryUsed", ctypes.c_size_t),
    )


class UiRestrictions(ctypes.Structure):
    """JOBOBJECT_BASIC_UI_RESTRICTIONS."""

    _fields_ = (("UIRestrictionsClass", ctypes.c_uint32),)


class Accounting(ctypes.Structure):
    """JOBOBJECT_BASIC_ACCOUNTING_INFORMATION."""

    _fields_ = (
        ("TotalUserTime", ctypes.c_int64),
        ("TotalKernelTime", ctypes.c_int64),
        ("ThisPeriodTotalUserTime", ctypes.c_int64),
        ("ThisPeriodTotalKernelTime", ctypes.c_int64),
        ("TotalPageFaultCount", ctypes.c_uint32),
        ("TotalProcesses", ctypes.c_uint32),
        ("ActiveProcesses", ctypes.c_uint32),
        ("TotalTerminatedProcesses", ctypes.c_uint32),
    )


class StartupInfo(NamedTuple):
    """What `_winapi.CreateProcess` reads off the object that subprocess calls STARTUPINFO."""

    hStdInput: int
    hStdOutput: int
    hStdError: int
    lpAttributeList: dict[str, list[int]]
    dwFlags: int = STARTF_USESTDHANDLES
    wShowWindow: int = 0


def startup_info(stdin: int, stdout: int, stderr: int) -> StartupInfo:
    """The child gets these three handles and inherits no other, whatever else is inheritable in this process."""
    return StartupInfo(stdin, stdout, stderr, {"handle_list": [stdin, stdout, stderr]})


class Started(NamedTuple):
    """A process that was created suspended: handles of it and of its first thread, and its number."""

    process: int
    thread: int
    pid: int


_HANDLE = ctypes.c_void_p
_BOOL = ctypes.c_int32
_DWORD = ctypes.c_uint32
# name -> result, arguments. Without them ctypes would cut 64-bit handles down to 32 bits.
_PROTOTYPES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "CreateJobObjectW": (_HANDLE, (_HANDLE, ctypes.c_wchar_p)),
    "SetInformationJobObject": (_BOOL, (_HANDLE, ctypes.c_int32, _HANDLE, _DWORD)),
    "QueryInformationJobObject": (_BOOL, (_HANDLE, ctypes.c_int32, _HANDLE, _DWORD, _HANDLE)),
    "AssignProcessToJobObject": (_BOOL, (_HANDLE, _HANDLE)),
    "IsProcessInJob": (_BOOL, (_HANDLE, _HANDLE, ctypes.POINTER(_BOOL))),
    "TerminateJobObject": (_BOOL, (_HANDLE, _DWORD)),
    "TerminateProcess": (_BOOL, (_HANDLE, _DWORD)),
    "GetExitCodeProcess": (_BOOL, (_HANDLE, ctypes.POINTER(_DWORD))),
    "ResumeThread": (_DWORD, (_HANDLE,)),
    "GenerateConsoleCtrlEvent": (_BOOL, (_DWORD, _DWORD)),
    "GetConsoleProcessList": (_DWORD, (ctypes.POINTER(_DWORD), _DWORD)),
    "PeekNamedPipe": (_BOOL, (_HANDLE, _HANDLE, _DWORD, _HANDLE, ctypes.POINTER(_DWORD), _HANDLE)),
    "CloseHandle": (_BOOL, (_HANDLE,)),
}


class Kernel32:
    """kernel32.dll. Every method raises OSError with the Windows error, unless it says otherwise."""

    def __init__(self) -> None:
        self._dll: Any
        if sys.platform == "win32":
            self._dll = ctypes.WinDLL("kernel32", use_last_error=True)
            for name, (result, arguments) in _PROTOTYPES.items():
                function = getattr(self._dll, name)
                function.restype, function.argtypes = result, arguments
        else:
            raise OSError(f"there is no kernel32.dll on {sys.platform}")

    def _call(self, name: str, *arguments: Any) -> Any:
        answer = getattr(self._dll, name)(*arguments)
        if not answer and sys.platform == "win32":
            raise ctypes.WinError(ctypes.get_last_error())
        return answer

    # ---- jobs

    def create_job(self) -> int:
        """A new, nameless job, whose handle no child inherits."""
        return int(self._call("CreateJobObjectW", None, None))

    def set_job(self, job: int, info: int, value: ctypes.Structure) -> None:
        """SetInformationJobObject."""
        self._call("SetInformationJobObject", job, info, ctypes.byref(value), ctypes.sizeof(value))

    def query_job(self, job: int, info: int, value: ctypes.Structure) -> None:
        """QueryInformationJobObject; fills `value`."""
        self._call("QueryInformationJobObject", job, info, ctypes.byref(value), ctypes.sizeof(value), None)

    def assign(self, job: int, process: int) -> None:
        """AssignProcessToJobObject."""
        self._call("AssignProcessToJobObject", job, process)

    def in_job(self, process: int, job: int | None) -> bool:
        """Whether a process is in this job; in any, when None."""
        answer = _BOOL()
        self._call("IsProcessInJob", process, job, ctypes.byref(answer))
        return bool(answer.value)

    def terminate_job(self, job: int, code: int) -> None:
        """End every process of a job with this exit code."""
        self._call("TerminateJobObject", job, code)

    # ---- processes

    def create_process(
        self, command: str, flags: int, env: Mapping[str, str] | None, cwd: str | None, handles: StartupInfo
    ) -> Started:
        """CreateProcessW through the interpreter's own binding."""
        if sys.platform == "win32":
            import _winapi

            environment: Any = None if env is None else dict(env)
            made = _winapi.CreateProcess(None, command, None, None, True, flags, environment, cwd, handles)
            return Started(*made[:3])
        else:
            raise OSError("CreateProcess is a call of Windows")

    def resume(self, thread: int) -> None:
        """Let a suspended thread run."""
        if self._dll.ResumeThread(thread) == 0xFFFF_FFFF and sys.platform == "win32":
            raise ctypes.WinError(ctypes.get_last_error())

    def exit_code(self, process: int) -> int:
        """Unsigned, 32 bits."""
        code = _DWORD()
        self._call("GetExitCodeProcess", process, ctypes.byref(code))
        return int(code.value)

    def terminate_process(self, process: int, code: int) -> None:
        """TerminateProcess."""
        self._call("TerminateProcess", process, code)

    def close(self, handle: int) -> None:
        """CloseHandle."""
        self._call("CloseHandle", handle)

    # ---- consoles and pipes

    def has_console(self) -> bool:
        """Whether this process has a console that children can share; a service has none."""
        return bool(self._dll.GetConsoleProcessList((_DWORD * 1)(), 1))

    def press_break(self, group: int) -> None:
        """CTRL_BREAK for every process of the group that shares our console."""
        self._call("GenerateConsoleCtrlEvent", CTRL_BREAK_EVENT, group)

    def bytes_waiting(self, pipe: int) -> int:
        """How much can be read at once; 0 also when the other end is closed."""
        count = _DWORD()
        if not self._dll.PeekNamedPipe(pipe, None, 0, None, ctypes.byref(count), None):
            return 0
        return int(count.value)

    def pipe(self, *, ours_reads: bool, size: int) -> tuple[int, int]:
        """A pipe whose end of ours can be waited for and whose other end a child can inherit: (ours, theirs)."""
        if sys.platform == "win32":
            import os
            from asyncio.windows_utils import pipe

            reading, writing = pipe(overlapped=(ours_reads, not ours_reads), bufsize=size)
            ours, theirs = (reading, writing) if ours_reads else (writing, reading)
            os.set_handle_inheritable(theirs, True)
            return ours, theirs
        else:
            raise OSError("named pipes of this kind are a thing of Windows")
