"""Admission: whether an offered job is taken. Pure: an offer and the situation in, a verdict out."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from protocol import work
from protocol.faults import FaultError
from protocol.ids import is_safe_id
from protocol.link_wire import Offer

# Jobs that may wait at the model beyond those that run: the next one starts without a round trip to the coordinator.
QUEUE_AHEAD = 2
# What the records of a worker can hold; no job is tried so often.
MOST_ATTEMPTS = 2**31 - 1
# No GPU has a PiB; what claims to need one is nonsense.
MOST_VRAM_GB = 2.0**20
BUSY_RETRY_MS = 1000
DRAINING_RETRY_MS = 60_000
PAUSED_RETRY_MS = 10_000


class ModelState(msgspec.Struct, frozen=True, kw_only=True):
    """One model as admission sees it.

    Attributes:
        kinds: task kinds it serves.
        slots: runs at once.
        taken: attempts of it that this worker holds and that have not ended.
        job_vram_bytes: most GPU memory that a job may say it needs; 0 sets no limit.
        available: whether it is announced; `reason` says why not.
        held: kind -> why no jobs of that kind are taken, as a phrase: a cordon.
        held_ms: kind -> what is left of it; kinds whose end is not known are left out.
    """

    kinds: tuple[str, ...]
    slots: int = 1
    taken: int = 0
    job_vram_bytes: int = 0
    available: bool = True
    reason: str = ""
    held: Mapping[str, str] = {}
    held_ms: Mapping[str, int] = {}


class Situation(msgspec.Struct, frozen=True, kw_only=True):
    """What admission knows besides the offer.

    Attributes:
        draining: reason, or "" when not.
        paused: reason, or "" when not; `paused_ms` is what is left of it, 0 when its end is not known.
    """

    models: Mapping[str, ModelState]
    draining: str = ""
    paused: str = ""
    paused_ms: int = 0


class Take(msgspec.Struct, frozen=True):
    """The job is taken."""


class Refuse(msgspec.Struct, frozen=True):
    """The job is not taken. `code` as in `protocol.link_wire.Decline`; `reason` is one sentence."""

    code: str
    reason: str
    retry_after_ms: int = 0


Verdict = Take | Refuse


def admit(offer: Offer, job: str, attempt: int, situation: Situation) -> Verdict:
    """Judge an offer. What could be mended by waiting comes first, what never can be last."""
    if situation.draining:
        return Refuse("draining", f"The worker is draining: {situation.draining}.", DRAINING_RETRY_MS)
    if situation.paused:
        return Refuse("paused", f"The worker is paused: {situation.paused}.", situation.paused_ms or PAUSED_RETRY_MS)
    if not is_safe_id(job) or not 1 <= attempt <= MOST_ATTEMPTS:
        return Refuse("bad_offer", f"{job[:200]!r} with attempt {attempt} is not a job id and an attempt from 1.")
    model = situation.models.get(offer.model)
    if model is None:
        return Refuse("unknown_model", f"This worker has no model {offer.model!r}.")
    if not model.available:
        # Not for good: it is still being checked, or its pause or quarantine ends.
        reason = f"The model {offer.model!r} is not available: {model.reason}"
        return Refuse("unknown_model", reason, BUSY_RETRY_MS)
    if offer.kind not in model.kinds:
        return Refuse("unsupported", f"The model {offer.model!r} does not serve {offer.kind!r}.")
    if why := model.held.get(offer.kind):
        # Not "paused": that word keeps every other kind away as well.
        text = f"The worker takes no {offer.kind} jobs for {offer.model!r}: {why}."
        return Refuse("busy", text, model.held_ms.get(offer.kind) or PAUSED_RETRY_MS)
    if problem := _bad_content(offer):
        return problem
    if not 0 <= offer.vram_gb_estimate < MOST_VRAM_GB:
        return Refuse("bad_offer", f"vram_gb_estimate: {offer.vram_gb_estimate} is no amount of memory.")
    if model.job_vram_bytes and offer.vram_gb_estimate * 2**30 > model.job_vram_bytes:
        most = f"{model.job_vram_bytes / 2**30:.1f} GiB"
        return Refuse(
            "too_large", f"The job may need {offer.vram_gb_estimate:.1f} GiB of GPU memory, here at most {most}."
        )
    if model.taken >= model.slots + QUEUE_AHEAD:
        return Refuse("busy", f"The model {offer.model!r} has {model.taken} jobs already.", BUSY_RETRY_MS)
    return Take()


def _bad_content(offer: Offer) -> Refuse | None:
    try:
        work.parse_params(offer.kind, offer.params)
    except FaultError as error:
        return Refuse("bad_offer", error.fault.message)
    except msgspec.MsgspecError as error:
        return Refuse("bad_offer", f"The parameters are not msgpack: {error}.")
    names = [file.name for file in offer.inputs]
    if len(set(names)) != len(names) or not all(is_safe_id(name) for name in names):
        return Refuse("bad_offer", "The names of the input files are not distinct plain names.")
    for file in offer.inputs:
        ceiling = work.MAX_INPUT_BYTES.get(file.name, work.MAX_AUDIO_BYTES)
        if not 0 <= file.size <= ceiling:
            return Refuse("too_large", f"The input {file.name!r} of {file.size} bytes exceeds {ceiling} bytes.")
    return None
