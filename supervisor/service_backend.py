"""What the service managers have in common: asking their programs, writing their files, showing a state."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import trio

from supervisor.errors import ExitCode, NoPermission, SupervisorError
from supervisor.host.child import ChildSpec, run_child
from supervisor.service_units import ServicePlan

CALL_S = 60.0

# What each ending means for somebody who reads it in a service manager's words.
ENDINGS = {
    ExitCode.USAGE: "the command line is wrong: install the service again",
    ExitCode.REFUSED: "the coordinator refused this worker",
    ExitCode.INTERNAL: "a mistake of ours, or the embedded coordinator did not start",
    ExitCode.IDENTITY_HELD: "another process works under this identity",
    ExitCode.RESTART: "it asked to be started again",
    ExitCode.NO_PERMISSION: "a file or folder is out of its reach",
    ExitCode.BAD_CONFIG: "worker.toml has mistakes: supervisor config check",
    ExitCode.GPU_UNKILLABLE: "a process cannot be ended and holds the GPU: reset the GPU or reboot",
}


class ServiceFailed(SupervisorError):
    """The service manager cannot do what was asked; the text is a sentence with the cure."""

    exit_code = ExitCode.FAILED


class ServiceState(msgspec.Struct, frozen=True, kw_only=True):
    """One service, as its manager sees it; `supervisor service status --json` is this.

    Attributes:
        scope: "user" or "system".
        enabled: starts with the login or the box.
        active: it serves.
        state: the manager's own word.
        restarts: how often the manager has started it again.
        exit_code: of the latest life that has ended; None when there is none, or a signal ended it.
        status: what the supervisor says it does.
        unit: path of the unit's file.
        reason: why it does not run, as one sentence; "" when it does.
    """

    name: str
    scope: str
    installed: bool
    enabled: bool = False
    active: bool = False
    state: str = ""
    pid: int = 0
    restarts: int = 0
    exit_code: int | None = None
    status: str = ""
    unit: str = ""
    reason: str = ""


class Backend(Protocol):
    """One service manager, for one name and scope."""

    def text(self, plan: ServicePlan) -> str:
        """What would be written, for people."""

    def check(self) -> None:
        """Raise ServiceFailed or NoPermission when nothing can be installed here."""

    def prepare(self, plan: ServicePlan) -> list[str]:
        """Make what has to be there before the service is tried; returns words that start a program as its user."""

    def install(self, plan: ServicePlan, *, start: bool) -> list[str]:
        """Write and enable it, start it when asked; returns sentences for people."""

    def uninstall(self) -> list[str]:
        """Stop and remove it; returns sentences for people."""

    def state(self) -> ServiceState:
        """What the manager knows of it."""


class Called(msgspec.Struct, frozen=True):
    """How a program of the service manager ended. `code` is -1 when it had to be ended or died of a signal."""

    code: int
    out: str
    err: str

    def words(self) -> str:
        """What it said, for an error's sentence."""
        return (self.err or self.out).strip() or f"exit code {self.code}"


def call(
    *argv: str, deadline_s: float = CALL_S, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Called:
    """Run one program to its end.

    Raises:
        ServiceFailed: it is not installed.
    """
    spec = ChildSpec(name=Path(argv[0]).name, argv=argv, env=env, cwd=cwd)
    try:
        out, end, child = trio.run(functools.partial(run_child, spec, deadline_s=deadline_s))
    except OSError as error:
        raise ServiceFailed(f"{argv[0]} cannot be run: {error.strerror}.") from None
    except BaseExceptionGroup as group:
        found = group.subgroup(OSError)
        if found is None:
            raise
        raise ServiceFailed(f"{argv[0]} cannot be run.") from group
    return Called(-1 if end.code is None else end.code, out.decode(errors="replace"), "\n".join(child.stderr_tail()))


def write_unit(path: Path, data: bytes, mark: bytes) -> bool:
    """Put a file in place as a whole; returns whether that changed it.

    Raises:
        ServiceFailed: there is one that is not ours, by its lack of `mark`.
        NoPermission: it cannot be written.
    """
    try:
        old = path.read_bytes() if path.exists() else None
        if old is not None and mark not in old:
            raise ServiceFailed(f"{path} was not written by us; remove it, or choose another --name.")
        if old == data:
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_bytes(data)
        partial.chmod(0o644)  # whatever the umask: service managers and people read it
        partial.replace(path)
    except OSError as error:
        raise NoPermission(f"{path} cannot be written: {error.strerror}; is this the right user?") from None
    return True


def reason_of(exit_code: int | None) -> str:
    """The sentence for an exit code of `supervisor run`; "" for those that need none."""
    if not exit_code:
        return ""
    try:
        meaning = ENDINGS[ExitCode(exit_code)]
    except (KeyError, ValueError):
        return f"It ended with exit code {exit_code}."
    return f"It ended with exit code {exit_code}: {meaning}."


def rehearse(plan: ServicePlan, prefix: Sequence[str], environ: Mapping[str, str]) -> Called:
    """Check the configuration the way the service will: same interpreter, same user, bare environment, other folder."""
    argv = (*plan.argv[:-3], "config", "check", *plan.argv[-2:])
    return call(*prefix, *argv, env=environ, cwd=Path("/") if sys.platform != "win32" else None)
