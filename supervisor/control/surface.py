"""What the routes of the control API work on: everything that they show, and everybody whom they ask to act."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

from supervisor.control.login import Logins
from supervisor.control.snapshot import Snapshot


class Requests(Protocol):
    """Who is asked to act. Every call returns at once; its effect shows in the next snapshot."""

    def pause(self, reason: str, *, for_s: float | None, free_vram: bool) -> None:
        """Take no new jobs, for a while or until `resume`; also end loaded models when `free_vram`."""

    def resume(self) -> bool:
        """Lift the operator's hold; False when there was none."""

    def drain(self, reason: str, *, restart: bool) -> None:
        """Finish what runs, take nothing new, then end; with `restart` so that the service manager starts us again."""


class Surface(NamedTuple):
    """What the routes work on.

    Attributes:
        snapshot: everything at this moment, explained.
        requests: who acts.
        more_metrics: lines of further families (the GPUs').
        logins: who may use the page.
    """

    snapshot: Callable[[], Snapshot]
    requests: Requests
    more_metrics: Callable[[], Iterable[str]] = tuple
    logins: Logins | None = None
