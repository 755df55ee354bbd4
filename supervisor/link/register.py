"""What this worker announces: the models that were proved to work. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from protocol.link_wire import Capabilities, Gpu, ModelOffer
from supervisor.host.work import InstanceStatus, ModelSpec
from supervisor.intake.admission import ModelState

RESIDENT = frozenset({"ready", "busy"})


class Proof(msgspec.Struct, frozen=True, kw_only=True):
    """What the checks at start found out about one model.

    Attributes:
        ok: whether it may be announced.
        reason: why not; "" when ok.
        revision: of its files and load config.
    """

    ok: bool
    reason: str = ""
    revision: str = ""


PENDING = Proof(ok=False, reason="it is still being checked")


Barred = Callable[[ModelSpec], str]


def anywhere(_spec: ModelSpec) -> str:
    """No model is kept from being served."""
    return ""


# Kind -> why no jobs of it are taken for a model, and for how many more seconds (None: not known).
Cordons = Callable[[ModelSpec], Mapping[str, tuple[str, float | None]]]


def no_cordons(_spec: ModelSpec) -> Mapping[str, tuple[str, float | None]]:
    """Every kind is taken."""
    return {}


def why_not(proof: Proof, status: InstanceStatus | None, barred: str = "") -> str:
    """Why a model cannot be announced now; "" when it can. `barred`: why this machine cannot serve it."""
    if barred:
        return barred
    if not proof.ok:
        return proof.reason or "it did not pass its checks"
    if status is not None and status.blocked:
        return status.reason or "it cannot be loaded"
    return ""


def model_states(
    specs: Iterable[ModelSpec],
    proofs: Mapping[str, Proof],
    snapshot: Iterable[InstanceStatus],
    barred: Barred = anywhere,
    cordons: Cordons = no_cordons,
) -> dict[str, ModelState]:
    """Every configured model as admission sees it; `taken` is the ledger's to fill in."""
    lanes = _lanes(snapshot)
    states = {}
    for spec in specs:
        copies = lanes.get(spec.name, [])
        reason = why_not(proofs.get(spec.name, PENDING), _best(copies), barred(spec))
        held = cordons(spec)
        states[spec.name] = ModelState(
            kinds=spec.model.kinds,
            slots=_slots(copies),
            job_vram_bytes=copies[0].job_vram_bytes if copies else 0,
            available=not reason,
            reason=reason,
            held={kind: why for kind, (why, _left_s) in held.items()},
            held_ms={kind: int(left_s * 1000) for kind, (_why, left_s) in held.items() if left_s is not None},
        )
    return states


def model_offers(
    specs: Iterable[ModelSpec],
    proofs: Mapping[str, Proof],
    snapshot: Iterable[InstanceStatus],
    barred: Barred = anywhere,
    cordons: Cordons = no_cordons,
) -> tuple[ModelOffer, ...]:
    """The announcement of every model that works, in the order of the configuration."""
    lanes = _lanes(snapshot)
    offers = []
    for spec in specs:
        copies = lanes.get(spec.name, [])
        proof, status = proofs.get(spec.name, PENDING), _best(copies)
        held = cordons(spec)
        kinds = tuple(kind for kind in spec.model.kinds if kind not in held)
        if not kinds or why_not(proof, status, barred(spec)):
            continue
        offers.append(
            ModelOffer(
                name=spec.name,
                kinds=kinds,
                engine=spec.engine.name,
                slots=_slots(copies),
                resident=status is not None and status.state in RESIDENT,
                device=(status.device if status else "") or spec.model.device,
                revision=proof.revision,
                limits=dict(status.limits) if status else {},
                sandbox=dict(status.sandbox) if status else {},
            )
        )
    return tuple(offers)


def _lanes(snapshot: Iterable[InstanceStatus]) -> dict[str, list[InstanceStatus]]:
    """Model -> its lanes, one for each copy that it may have."""
    found: dict[str, list[InstanceStatus]] = {}
    for status in snapshot:
        found.setdefault(status.model, []).append(status)
    return found


def _best(copies: Sequence[InstanceStatus]) -> InstanceStatus | None:
    """The lane that stands best: one that is loaded, else one that can be, else any."""
    return min(copies, key=lambda each: (each.blocked, each.state not in RESIDENT), default=None)


def _slots(copies: Sequence[InstanceStatus]) -> int:
    """Runs at once of a model, over all copies that can be loaded; what one takes is known of those that were."""
    most = max((each.slots for each in copies), default=1)
    return most * max(1, sum(not each.blocked for each in copies))


def capabilities(
    models: tuple[ModelOffer, ...],
    *,
    labels: Mapping[str, str],
    machine: str,
    version: str,
    not_accepting: str = "",
    gpus: tuple[Gpu, ...] = (),
    deploys: bool = False,
    vram_threshold_gb: float = 0.0,
) -> Capabilities:
    """The whole announcement; `not_accepting` is the reason why no jobs are taken, or ""."""
    return Capabilities(
        models=models,
        gpus=gpus,
        labels=dict(labels),
        vram_threshold_gb=vram_threshold_gb,
        version=version,
        machine=machine,
        accepting=not not_accepting,
        reason=not_accepting,
        deploys=deploys,
    )
