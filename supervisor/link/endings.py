"""What is said of an attempt that did not end well."""

from __future__ import annotations

import logging

import msgspec

from protocol import link_wire as wire
from protocol.faults import Fault
from supervisor.observe.redact import safe

log = logging.getLogger(__name__)


def mistaken(error: Exception, streamed: bool) -> wire.Fail:
    """A mistake of our program costs the one job that it met; raised, it would end the link, and with it the others."""
    log.error("a job could not be worked on, by a mistake of this program", exc_info=error)
    sentence = f"The worker made a mistake of its own: {type(error).__name__}."
    return wire.Fail(fault=Fault("worker_failed", sentence), streamed=streamed)


def redacted(fault: Fault) -> Fault:
    """What an engine wrote on stderr may be about others' jobs, and may hold keys: it leaves the box as a log would."""
    tail = fault.detail.get("stderr_tail")
    if not isinstance(tail, list | tuple):
        return fault
    return msgspec.structs.replace(fault, detail={**fault.detail, "stderr_tail": safe(tail)})
