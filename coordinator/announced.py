"""What a worker may announce: bounds on what is kept, compared and put into statements for it from then on.

An owner's worker stays far below them. Without them one enrolled worker could stop the queue for all: a name that the
database does not take, a number of slots that it cannot count, models without end that are looked for at every look.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from coordinator.plain import json_bytes
from protocol.link_wire import Capabilities, ModelOffer
from protocol.work import is_kind

MOST_MODELS = 500
MOST_KINDS = 32
MOST_SLOTS = 10_000
MOST_GPUS = 256
MOST_FETCHES = 256
MOST_LABELS = 200
NAME_CHARS = 200
TEXT_CHARS = 1000
MOST_SAID_BYTES = 256 * 2**10  # of one model, and of the machine: all of it is shown again and again


def why_refused(capabilities: Capabilities) -> str:
    """A sentence that names the field and the cure; "" when all is well."""
    for name, count, most in (
        ("models", len(capabilities.models), MOST_MODELS),
        ("gpus", len(capabilities.gpus), MOST_GPUS),
        ("labels", len(capabilities.labels), MOST_LABELS),
    ):
        if count > most:
            return f"{name}: Announce at most {most}, not {count}."
    if not 0 <= capabilities.vram_threshold_gb < math.inf:
        return "vram_threshold_gb: Announce a number of GiB, or 0 to say nothing."
    if not _are_texts((*capabilities.labels, *capabilities.labels.values()), TEXT_CHARS):
        return f"labels: Announce texts of at most {TEXT_CHARS} characters, without NUL."
    size = json_bytes((capabilities.version, capabilities.machine, capabilities.reason, capabilities.gpus))
    if size is None or size > MOST_SAID_BYTES:
        return f"version, machine, reason, gpus: Announce at most {MOST_SAID_BYTES} bytes."
    return next((words for offer in capabilities.models if (words := _why_not(offer))), "")


def _why_not(offer: ModelOffer) -> str:
    if not offer.name or not _are_texts((offer.name,), NAME_CHARS):
        return f"models: {offer.name[:50]!r} is no name of 1 to {NAME_CHARS} characters without NUL."
    if len(offer.kinds) > MOST_KINDS or not all(is_kind(kind) for kind in offer.kinds):
        return f"models: {offer.name[:50]!r} has kinds that are none, or more than {MOST_KINDS}."
    if not 0 <= offer.slots <= MOST_SLOTS:
        return f"models: {offer.name[:50]!r} has {offer.slots} slots; announce 0 to {MOST_SLOTS}."
    size = json_bytes((offer.engine, offer.device, offer.revision, offer.limits, offer.sandbox))
    if size is None or size > MOST_SAID_BYTES:
        return f"models: {offer.name[:50]!r} says more than {MOST_SAID_BYTES} bytes of itself, or what JSON cannot say."
    return ""


def _are_texts(texts: Iterable[str], most: int) -> bool:
    return all(len(text) <= most and "\0" not in text for text in texts)
