"""What is refused before it is queued: a job that nobody could run, or that is larger than a message."""

from __future__ import annotations

import msgspec

from coordinator.fleet import FOREVER, Fleet
from coordinator.records import Submission
from coordinator.store.needs import MAX_NEEDS_BYTES, needs_of
from protocol import link_wire as wire
from protocol.faults import FaultError, refuse
from protocol.work import is_kind

# Params travel inside the offer; what is left of a message is for everything else in it.
MAX_PARAMS_BYTES = wire.MAX_MESSAGE_BYTES - 256 * 2**10
RETRY_HINT_S = 5


def check(s: Submission, fleet: Fleet, now: float = FOREVER) -> None:
    """Check a submission by itself, and by who is connected unless it wants to wait for a worker.

    Without `now`, the fleet's clock in seconds, nobody rests.

    Raises:
        FaultError: unsupported, payload_too_large, invalid_parameter, model_not_found, no_worker, quarantined.
    """
    if not is_kind(s.kind):
        raise refuse("unsupported", f"There is no task kind named {s.kind!r}.", "kind")
    if len(s.params) > MAX_PARAMS_BYTES:
        raise refuse("payload_too_large", f"The parameters exceed {MAX_PARAMS_BYTES} bytes.", "params")
    if s.max_attempts < 1:
        raise refuse("invalid_parameter", "max_attempts: Expected at least 1.", "max_attempts")
    if s.deadline_ms < 0:
        raise refuse("invalid_parameter", "deadline_ms: Expected 0 (none) or more.", "deadline_ms")
    if len(needs_of(s.labels, s.vram_gb_estimate).encode()) > MAX_NEEDS_BYTES:
        message = f"labels: Expected at most {MAX_NEEDS_BYTES} bytes of names and values together."
        raise refuse("invalid_parameter", message, "labels")
    fault = None if s.wait_for_worker else fleet.judge(s.kind, s.model, s.labels, s.vram_gb_estimate, now)
    if fault is not None and s.asked and fault.code != "quarantined":
        raise refuse(
            "no_worker",
            f"The model {s.asked!r} is being deployed, and no worker is ready to take it; try again.",
            retry_after_s=RETRY_HINT_S,
        )
    if fault is not None:
        words = fault.message.replace(repr(s.model), repr(s.asked)) if s.asked else fault.message
        raise FaultError(msgspec.structs.replace(fault, message=words))
