"""Which workers shall serve which revision. Pure: rows in, changes out; times are handed in.

A placement is one worker for one revision:

    wanted ──► fetching ──► ready ──► leaving ──► (gone)
       ▲           │           │
       │           ▼           ▼ it is not announced any more
       └──────── failed ◄──────┘

`plan` only adds placements and turns them to `leaving`; what becomes of an order is written by whoever gave it.

- A worker that is away keeps its placements for `GRACE_MS`: most come back, with the model on their disk. After that
  another one is chosen. Once as many as are wanted serve without it, it is to let go.
- Who is away cannot be asked to let go. That it is to stays written down, also when the deployment has gone meanwhile,
  and it is asked when it comes back. What it serves besides is its owner's, or another coordinator's.
- One that is to let go of what is wanted again is chosen first: it may have it still.
- A worker that fails again and again keeps its row, so that it says why, and others are chosen beside it.
- A new revision is placed on the same workers first: what serves the old one may serve the new one. The old one
  serves until as many as it has are ready, or as many as are wanted, whichever is less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from coordinator.deploy.spec import Asked, Candidate, Deployment, Placement, why_not

GRACE_MS = 60_000
FIRST_PAUSE_MS = 15_000
LONGEST_PAUSE_MS = 15 * 60_000
GIVEN_UP_AFTER = 3  # failures in a row: from then on the worker does not count, and is only tried beside others


class Changes(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be written.

    Attributes:
        add: placements that shall be; one that was to leave may be among them.
        leave: placements that shall go.
        current: the revision that answers clients from now on; None leaves it.
        over: the deployment was given up, and nobody who is here has anything of it.
    """

    add: tuple[Placement, ...] = ()
    leave: tuple[Placement, ...] = ()
    current: str | None = None
    over: bool = False


def plan(deployment: Deployment, placements: Sequence[Placement], candidates: Mapping[str, Candidate]) -> Changes:
    """What has to change so that the deployment becomes as it was asked for.

    Args:
        placements: all of this deployment.
        candidates: by worker id, those that are away for less than a while included.
    """
    asked = deployment.asked
    wanted = [one for one in placements if one.revision == asked.revision and one.state != "leaving"]
    others = [one for one in placements if one.revision != asked.revision and one.state != "leaving"]
    kept, surplus = _keep(asked, wanted, candidates)
    add = _add(asked, kept, placements, candidates)
    current = _current(deployment, wanted, others, candidates)
    serving = deployment.current if current is None else current
    old = [one for one in others if one.revision != serving or asked.replicas == 0]
    over = deployment.leaving and all(one.state == "leaving" and _is_lost(one, candidates) for one in placements)
    return Changes(add=tuple(add), leave=(*surplus, *old), current=current, over=over)


def due(placement: Placement, now_ms: int) -> bool:
    """Whether an order may be given for it now."""
    if placement.state == "failed":
        return due_in_s(placement, now_ms) <= 0
    return placement.state in ("wanted", "leaving")


def due_in_s(placement: Placement, now_ms: int) -> float:
    """How long one that failed is left alone from now on, in seconds."""
    pause = min(LONGEST_PAUSE_MS, FIRST_PAUSE_MS << min(20, max(0, placement.failures - 1)))
    return max(0.0, (placement.changed_ms + pause - now_ms) / 1000)


def counts(asked: Asked, placement: Placement, candidates: Mapping[str, Candidate]) -> bool:
    """Whether it is one of the `replicas`: it is ready, or there is hope that it will be."""
    if _is_lost(placement, candidates) or why_not(asked, candidates[placement.worker]):
        return False
    return placement.failures < GIVEN_UP_AFTER


def _keep(
    asked: Asked, wanted: Sequence[Placement], candidates: Mapping[str, Candidate]
) -> tuple[list[Placement], list[Placement]]:
    """The placements that count, and those that are too many or may not be any more."""
    count = [one for one in wanted if counts(asked, one, candidates)]
    ranked = sorted(
        count,
        key=lambda one: (
            one.state != "ready",
            not candidates[one.worker].connected,
            one.failures,
            one.changed_ms,
            one.worker,
        ),
    )
    kept, surplus = ranked[: asked.replicas], ranked[asked.replicas :]
    enough = len(kept) >= asked.replicas and all(serves(one, candidates) for one in kept)
    for one in wanted:
        candidate = candidates.get(one.worker)
        if one in count:
            continue
        forbidden = candidate is not None and why_not(asked, candidate)
        if forbidden or enough:  # until then, one that comes back may be the only one that serves
            surplus.append(one)
    return kept, surplus


def _add(
    asked: Asked, kept: Sequence[Placement], placements: Sequence[Placement], candidates: Mapping[str, Candidate]
) -> list[Placement]:
    missing = asked.replicas - len(kept)
    if missing <= 0:  # as almost always: nobody needs to be looked at
        return []
    of_it = [one for one in placements if one.revision == asked.revision]
    taken = {one.worker for one in of_it if one.state != "leaving"}
    has_it = {one.worker for one in of_it}
    serving = {one.worker for one in placements if one.state == "ready"}
    free = [
        candidate
        for candidate in candidates.values()
        if candidate.worker not in taken
        and candidate.connected
        and not candidate.draining
        and not why_not(asked, candidate)
    ]
    free.sort(
        key=lambda one: (
            one.worker not in has_it,
            one.worker not in serving,
            one.load,
            one.worker,
        )
    )
    chosen = free[:missing]
    return [Placement(deployment=asked.name, revision=asked.revision, worker=candidate.worker) for candidate in chosen]


def _current(
    deployment: Deployment,
    wanted: Sequence[Placement],
    others: Sequence[Placement],
    candidates: Mapping[str, Candidate],
) -> str | None:
    """The revision that is to answer; those that are away neither answer nor are waited for."""
    revision = deployment.asked.revision
    if deployment.current == revision or deployment.asked.replicas == 0:
        return None
    ready = sum(serves(one, candidates) for one in wanted)
    before = [one for one in others if one.state == "ready" and one.revision == deployment.current]
    still = sum(not _is_lost(one, candidates) for one in before)
    return revision if ready >= max(1, min(deployment.asked.replicas, still)) else None


def serves(placement: Placement, candidates: Mapping[str, Candidate]) -> bool:
    """Whether it is ready, and its worker here."""
    candidate = candidates.get(placement.worker)
    return placement.state == "ready" and candidate is not None and candidate.connected


def _is_lost(placement: Placement, candidates: Mapping[str, Candidate]) -> bool:
    candidate = candidates.get(placement.worker)
    return candidate is None or candidate.lost_ms >= GRACE_MS
