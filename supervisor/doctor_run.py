"""The table of all checks, and the two who ask for them: a command, and a running supervisor about itself."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import trio

from supervisor import doctor_box, doctor_engines, doctor_link
from supervisor.config import control_socket, find_config, read, state_dir
from supervisor.control.client import ask
from supervisor.doctor import Check, Patient, examine, plain
from supervisor.errors import ConfigError, SupervisorError
from supervisor.settings import Settings

STATUS_S = 5.0
# A whole examination, for whoever waits for it over the control socket.
ALL_S = 60.0

CHECKS = (
    Check("config", doctor_box.config),
    Check("state", doctor_box.state),
    Check("supervisor", doctor_box.control),
    Check("service", doctor_box.service, within_s=20.0),
    Check("coordinator", doctor_link.coordinator, within_s=20.0),
    Check("port", doctor_link.port, offline=True),
    Check("gpu", later=doctor_engines.gpus, within_s=doctor_engines.GPU_S + 5.0),
    Check("engines", doctor_engines.engines, within_s=20.0),
    Check("models", doctor_engines.models),
    Check("sandbox", later=doctor_engines.sandbox, within_s=doctor_engines.PROBE_S),
    Check("cgroup", doctor_box.cgroup),
    Check("limits", doctor_box.limits),
    Check("memory", doctor_box.memory),
    Check("clock", doctor_box.clock),
)


def patient_here(given: str | None, environ: Mapping[str, str] = os.environ) -> Patient:
    """What a command examines: the configuration as found, and the running supervisor when one answers."""
    try:
        path = find_config(given, environ)
        loaded = read(path, environ)
    except ConfigError as error:
        place = Path(given).expanduser() if given else None
        settings = Settings()
        return Patient(place, None, state_dir(settings, environ), tuple(error.problems), environ=environ)
    seen = None
    try:
        seen = ask(control_socket(loaded.settings), "GET", "/v1/status", patience_s=STATUS_S)
    except SupervisorError:
        pass  # the check "supervisor" looks why
    state = state_dir(loaded.settings, environ)
    return Patient(path, loaded.settings, state, notes=tuple(loaded.notes), seen=seen, environ=environ)


def examined_here(given: str | None, on_progress: Callable[[Sequence[str]], None] | None = None) -> dict[str, Any]:
    """Examine this machine from a command; plain values as of `doctor.plain`. Exit code 0 when `["ok"]`, else 1.

    Args:
        given: worker.toml; None looks for it.
        on_progress: told what still runs, when it takes longer; by default a line on stderr where that is a terminal.
    """
    patient = patient_here(given)
    tell = _tell if on_progress is None else on_progress
    findings = trio.run(functools.partial(examine, patient, CHECKS, tell))
    return plain(findings, running=patient.seen is not None)


def _tell(left: Sequence[str]) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[Kstill looking at: {', '.join(left)}\r" if left else "\r\033[K")
        sys.stderr.flush()


class SelfExamination:
    """A running supervisor about itself; one at a time, whoever else asks is given the same answer.

    Args:
        settings: those in force.
        snapshot: as it is served.
    """

    def __init__(
        self, config: Path | None, settings: Callable[[], Settings], state: Path, snapshot: Callable[[], Any]
    ) -> None:
        self._config, self._settings, self._state, self._snapshot = config, settings, state, snapshot
        self._lock = trio.Lock()
        self._last: dict[str, Any] = {}
        self._number = 0

    async def examined(self) -> dict[str, Any]:
        """Plain values as of `doctor.plain`.

        Cancellation: children are ended.
        """
        number = self._number
        async with self._lock:
            if self._number == number:
                self._last = await self._once()
                self._number += 1
            return self._last

    async def _once(self) -> dict[str, Any]:
        problems: tuple[str, ...] = ()
        notes: tuple[str, ...] = ()
        if self._config is not None:
            try:
                notes = (await trio.to_thread.run_sync(read, self._config)).notes
            except ConfigError as error:  # the old one stays in force
                problems = tuple(error.problems)
        seen = msgspec.to_builtins(self._snapshot(), enc_hook=str)
        patient = Patient(self._config, self._settings(), self._state, problems, tuple(notes), seen, inside=True)
        return plain(await examine(patient, CHECKS), running=True)
