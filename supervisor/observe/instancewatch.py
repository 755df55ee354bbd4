"""What the host tells of its instances, as one line of the log and one number each.

The host calls, nobody is asked anything, and nothing here blocks or raises.
"""

from __future__ import annotations

import logging

from supervisor.observe.figures import amount, span
from supervisor.observe.tally import Tally

log = logging.getLogger(__name__)

FORCES = ("SIGTERM", "SIGKILL", "unkillable")


class InstanceWatch:
    """See the module."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    def loaded(
        self, model: str, engine: str, seconds: float, *, device: str, vram_bytes: int = 0, rss_bytes: int = 0
    ) -> None:
        """An instance is ready.

        Args:
            seconds: since its process was started; the wait for room before that is no part of a load.
            device: where it runs, as the engine says.
            vram_bytes: GPU memory that the load took; 0 when it is not known.
            rss_bytes: resident memory after the load; 0 when it is not known.
        """
        self._tally.loaded(engine, seconds)
        count, what = (rss_bytes, "") if device == "cpu" else (vram_bytes, "") if vram_bytes else (rss_bytes, " of RAM")
        log.info("%s loaded on %s in %s%s", model, device, span(seconds), f", {amount(count)}{what}" if count else "")

    def forced(self, model: str, engine: str, force: str) -> None:
        """An instance needed more than a word to end: one of `FORCES`, the hardest that was used on it."""
        self._tally.escalated(engine, force)
        log.debug("%s was ended by %s", model, force)
