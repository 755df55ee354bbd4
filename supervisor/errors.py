"""The supervisor's error tree and its exit codes.

    SupervisorError              ends a command with its `exit_code` and its sentence on stderr
    ├── ConfigError              worker.toml is wrong (78)
    ├── IdentityHeld             another process works with this state folder or this worker id (73)
    ├── NoPermission             a file or folder of ours cannot be used (77)
    ├── LinkRefused              the coordinator refused this worker for good (69)
    ├── GpuUnkillable            a process that cannot be killed holds the last GPU (79)
    └── CoordinatorFailed        the embedded coordinator does not start (70)

A service manager restarts on 70 and 75 only; the others need a person first.
"""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """How `supervisor run` ends."""

    STOPPED = 0  # asked to stop
    FAILED = 1  # a command other than `run` did not succeed
    NOT_RUNNING = 3  # `status`, `pause` and the like: there is nobody to ask
    USAGE = 64
    REFUSED = 69  # authentication, revoked, deleted, version: not restarted
    INTERNAL = 70
    IDENTITY_HELD = 73
    RESTART = 75  # restart me
    NO_PERMISSION = 77
    BAD_CONFIG = 78
    GPU_UNKILLABLE = 79  # a reset or a reboot is needed


class SupervisorError(Exception):
    """Something that ends the command; the text is one sentence for people, with the cure."""

    exit_code = ExitCode.INTERNAL


class ConfigError(SupervisorError):
    """worker.toml is wrong. `problems` has one line for each thing to mend."""

    exit_code = ExitCode.BAD_CONFIG

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class IdentityHeld(SupervisorError):
    """Another process holds this state folder, or another session this worker id."""

    exit_code = ExitCode.IDENTITY_HELD


class NoPermission(SupervisorError):
    """A file or folder that the supervisor needs is out of its reach."""

    exit_code = ExitCode.NO_PERMISSION


class LinkRefused(SupervisorError):
    """The coordinator will not take this worker, however often it asks."""

    exit_code = ExitCode.REFUSED


class GpuUnkillable(SupervisorError):
    """No GPU is left that a process does not hold for ever."""

    exit_code = ExitCode.GPU_UNKILLABLE


class CoordinatorFailed(SupervisorError):
    """The embedded coordinator did not become ready."""

    exit_code = ExitCode.INTERNAL
