"""What the owner orders over the control socket, carried to those who act."""

from __future__ import annotations

import logging
from collections.abc import Callable

from supervisor.intake.holds import Mode, Source
from supervisor.pausing import Pausing

log = logging.getLogger(__name__)


class Orders:
    """Implements `supervisor.control.surface.Requests`.

    Args:
        drain: begins the drain of the supervisor, with its reason, and whether it shall be started again.
    """

    def __init__(self, pausing: Pausing, drain: Callable[[str, bool], None]) -> None:
        self._pausing, self._drain = pausing, drain

    def pause(self, reason: str, *, for_s: float | None, free_vram: bool) -> None:
        """See `Requests`."""
        mode = Mode.UNLOAD if free_vram else Mode.STOP
        self._pausing.put(Source.OPERATOR, reason, for_s=for_s, mode=mode)

    def resume(self) -> bool:
        """See `Requests`."""
        return self._pausing.lift(Source.OPERATOR)

    def drain(self, reason: str, *, restart: bool) -> None:
        """See `Requests`."""
        log.info("the owner asked for a %s: %s", "restart" if restart else "drain", reason)
        self._drain(reason, restart)
