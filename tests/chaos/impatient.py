"""Runs one of our programs with shorter pauses, so that a minute holds as many sessions as a bad day.

`python impatient.py supervisor run …` or `… coordinator serve …`. Nothing but durations differs.
"""

from __future__ import annotations

import functools
import sys

BEAT_MS = 500
IDLE_S = 2.0


def coordinator() -> int:
    """Beats twice a second."""
    from coordinator import gateway
    from coordinator.cli.main import main

    gateway.GatewaySettings = functools.partial(gateway.GatewaySettings, heartbeat_ms=BEAT_MS)
    return main(sys.argv[2:])


def supervisor() -> int:
    """Is back within a second."""
    from supervisor import app
    from supervisor.cli import main
    from supervisor.link import keeping, transfer
    from supervisor.link.reconnect import Backoff

    app.Backoff = functools.partial(Backoff, 0.05, 0.5, 2.0)
    transfer.Backoff = lambda *_: Backoff(0.05, 0.5)
    transfer.IDLE_S = IDLE_S
    keeping.TRY_AGAIN_S = 0.5
    return main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit({"coordinator": coordinator, "supervisor": supervisor}[sys.argv[1]]())
