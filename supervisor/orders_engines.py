"""The host and the link, as the owner's orders see them: single models, and single jobs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Protocol

import msgspec

from protocol.faults import Fault
from supervisor.control.exchange import Refused
from supervisor.host.lifecycle import LOADED
from supervisor.host.work import InstanceStatus
from supervisor.link.ledger import Ledger

StopModels = Callable[[Collection[str], Fault], None]


class Instances(Protocol):
    """What is asked of the host."""

    def snapshot(self) -> Sequence[InstanceStatus]:
        """State of every instance; a model with several copies has several."""

    def preload(self, model: str, *, ordered: bool = False) -> None:
        """Load a model before anybody asks for it; with `ordered`, models without work make room."""

    def unload(self, model: str, reason: str, *, again: bool) -> None:
        """End all its instances, each after its last run; with `again` it is then loaded anew."""


class HostEngines:
    """Implements `supervisor.orders.Engines`.

    Args:
        stop_models: gives the jobs of models back with this fault (`Attempts.stop_models`).
        refused: why a model is not served now, a phrase; "" when it is.
    """

    def __init__(
        self, host: Instances, stop_models: StopModels, refused: Callable[[str], str] = lambda _model: ""
    ) -> None:
        self._host, self._stop_models, self._refused = host, stop_models, refused

    def names(self) -> Sequence[str]:
        """See `Engines`."""
        return list(dict.fromkeys(status.model for status in self._host.snapshot()))

    def why_not(self, model: str) -> str:
        """See `Engines`."""
        status = self._status(model)
        reason = status.reason if status.blocked else self._refused(model)
        return reason if not reason or reason.endswith(".") else f"{reason}."

    def users(self, model: str) -> str:
        """See `Engines`."""
        status = self._status(model)
        parts = [
            f"{_jobs(status.running)} run{_s(status.running)} on it" if status.running else "",
            _wait(status.queued),
            f"it is loaded (pid {status.pid})" if status.pid else "",
        ]
        return ", ".join(part for part in parts if part)

    def load(self, model: str) -> str:
        """See `Engines`."""
        status = self._status(model)
        if status.state in ("ready", "busy"):
            return f"{model} is loaded already."
        self._host.preload(model, ordered=True)
        return f"{model} is being loaded."

    def unload(self, model: str, reason: str) -> str:
        """See `Engines`. What waits for the model loads it again, so it is said.

        Raises:
            Refused: it is being loaded for jobs that wait for it.
        """
        status = self._status(model)
        if not (status.pid or status.queued):
            self._host.unload(model, reason, again=False)  # an order to load it may be waiting for room
            return f"{model} is not loaded."
        if not status.pid:
            return f"{model} is not loaded; {_wait(status.queued)}."
        if status.queued and status.state not in LOADED:
            raise Refused(409, f"{model} is being loaded: {_wait(status.queued)}; cancel what waits, or pause first.")
        self._host.unload(model, reason, again=False)
        again = f"; {_wait(status.queued)}, and loads it again" if status.queued else ""
        return f"{model} ends {_when(status.running)}{again}."

    def restart(self, model: str, reason: str, *, now: bool) -> str:
        """See `Engines`."""
        status = self._status(model)
        if now and (status.running or status.queued):
            self._stop_models({model}, Fault("worker_stopping", f"The engine is restarted: {reason}."))
        if not status.pid or (status.queued and not now and status.state not in LOADED):
            self._host.preload(model, ordered=True)
            return f"{model} is being loaded."
        self._host.unload(model, reason, again=True)
        return f"{model} is loaded anew {_when(0 if now else status.running)}."

    def _status(self, model: str) -> InstanceStatus:
        """A model with several copies as one: the busiest state of them, and what all of them have."""
        copies = [status for status in self._host.snapshot() if status.model == model]
        best = max(copies, key=lambda status: (status.state in LOADED, bool(status.pid), not status.blocked))
        return msgspec.structs.replace(
            best,
            running=sum(status.running for status in copies),
            queued=sum(status.queued for status in copies),
            blocked=all(status.blocked for status in copies),
        )


class LinkJobs:
    """Implements `supervisor.orders.Jobs`.

    Args:
        give_back: `Attempts.give_back`.
    """

    def __init__(self, ledger: Ledger, give_back: Callable[[str, int, str], None]) -> None:
        self._ledger, self._give_back = ledger, give_back

    def running(self) -> Iterable[str]:
        """See `Jobs`."""
        return dict.fromkeys(claim.job for claim in self._ledger if claim.end is None)

    def cancel(self, job: str, reason: str) -> int:
        """See `Jobs`."""
        found = [claim for claim in self._ledger if claim.job == job and claim.end is None]
        for claim in found:
            self._give_back(claim.job, claim.attempt, reason)
        return len(found)


def _jobs(count: int) -> str:
    return f"{count} job{'' if count == 1 else 's'}"


def _s(count: int) -> str:
    """The ending of a verb."""
    return "s" if count == 1 else ""


def _wait(count: int) -> str:
    return f"{_jobs(count)} wait{_s(count)} for it" if count else ""


def _when(running: int) -> str:
    return f"after {_jobs(running)}" if running else "now"
