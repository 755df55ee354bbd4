"""For all tests: hypothesis must not fail because the machine is busy, and Ctrl-C means what it means to a user.

A shell that starts us in the background has SIGINT ignored, and the programs that are tested would inherit that.
"""

from __future__ import annotations

import signal

from hypothesis import HealthCheck, settings

settings.register_profile("shared", suppress_health_check=[HealthCheck.too_slow], deadline=None)
settings.load_profile("shared")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
