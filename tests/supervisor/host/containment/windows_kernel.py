"""A kernel32 that keeps books instead of running anything: handles, jobs, processes, and the order of calls."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Mapping

from supervisor.host.containment import windows_api as api


class BookKernel:
    """Stands in for `windows_api.Kernel32`.

    Attributes:
        calls: what was done, in order.
        open: handles that are not closed yet, and what they are.
        nested: whether this very process runs in a job.
        refuse: names of calls that fail.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.open: dict[int, str] = {}
        self.jobs: dict[int, dict[int, bytes]] = {}
        self.members: dict[int, set[int]] = {}
        self.codes: dict[int, int] = {}
        self.nested = False
        self.console = True
        self.refuse: set[str] = set()
        self.created: list[tuple[str, int, Mapping[str, str] | None, str | None, api.StartupInfo]] = []
        self.waiting: dict[int, int] = {}
        self._numbers = itertools.count(100)

    def _did(self, name: str) -> None:
        self.calls.append(name)
        if name in self.refuse:
            raise PermissionError(13, f"{name} is refused")

    def _handle(self, what: str) -> int:
        handle = next(self._numbers)
        self.open[handle] = what
        return handle

    # ---- jobs

    def create_job(self) -> int:
        self._did("create_job")
        job = self._handle("job")
        self.jobs[job], self.members[job] = {}, set()
        return job

    def set_job(self, job: int, info: int, value: ctypes.Structure) -> None:
        self._did(f"set_job {info}")
        self.jobs[job][info] = bytes(value)

    def query_job(self, job: int, info: int, value: ctypes.Structure) -> None:
        self._did(f"query_job {info}")
        if info == api.INFO_BASIC_ACCOUNTING:
            value.ActiveProcesses = len(self.members[job])  # type: ignore[attr-defined]
            return
        kept = self.jobs[job][info]
        assert len(kept) == ctypes.sizeof(value)
        ctypes.memmove(ctypes.addressof(value), kept, len(kept))

    def assign(self, job: int, process: int) -> None:
        self._did("assign")
        self.members[job].add(process)

    def in_job(self, process: int, job: int | None) -> bool:
        if job is None:
            return self.nested
        return process in self.members[job] and "in_job" not in self.refuse

    def terminate_job(self, job: int, code: int) -> None:
        self._did("terminate_job")
        for process in self.members[job]:
            self.codes.setdefault(process, code)
        self.members[job].clear()

    # ---- processes

    def create_process(
        self, command: str, flags: int, env: Mapping[str, str] | None, cwd: str | None, handles: api.StartupInfo
    ) -> api.Started:
        self._did("create_process")
        for handle in handles.lpAttributeList["handle_list"]:
            assert self.open[handle].startswith("theirs")
        self.created.append((command, flags, env, cwd, handles))
        return api.Started(self._handle("process"), self._handle("thread"), 4711)

    def resume(self, thread: int) -> None:
        assert self.open[thread] == "thread"
        self._did("resume")

    def exit_code(self, process: int) -> int:
        assert self.open[process] == "process"
        return self.codes.get(process, 0)

    def terminate_process(self, process: int, code: int) -> None:
        assert self.open[process] == "process"
        self._did("terminate_process")
        self.codes.setdefault(process, code)

    def close(self, handle: int) -> None:
        what = self.open.pop(handle)  # closing twice, or what was never open, is a KeyError
        self.calls.append(f"close {what}")
        if what == "job":
            for process in self.members[handle]:
                self.codes.setdefault(process, 0)

    # ---- consoles and pipes

    def has_console(self) -> bool:
        return self.console

    def press_break(self, group: int) -> None:
        self._did(f"press_break {group}")

    def bytes_waiting(self, pipe: int) -> int:
        return self.waiting.get(pipe, 0)

    def pipe(self, *, ours_reads: bool, size: int) -> tuple[int, int]:
        self._did("pipe")
        return self._handle(f"ours {'r' if ours_reads else 'w'}"), self._handle("theirs")
