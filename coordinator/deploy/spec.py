"""What a deployment is: a model, a hashed file, so many workers, and which of them may be chosen.

Clients ask for the deployment's name. Workers know each revision under a name of its own, `name@revision`, so that the
old and the new one can be served side by side while one takes the other's place.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from protocol.faults import refuse
from protocol.link_wire import Capabilities, Fetch

MAX_REPLICAS = 10_000
REVISION_CHARS = 10
NAME_CHARS = 100
# Keys of `on` that speak of the box; every other key is a label of the worker.
GPU, WORKER, VRAM_GB = "gpu", "worker", "vram_gb"

PlacementState = Literal["wanted", "fetching", "ready", "failed", "leaving"]

_PINNED = re.compile(r"^[\w.-]+/[\w.-]+@[0-9a-f]{40}\Z")

_REVISION = re.compile(rf"([A-Za-z0-9][A-Za-z0-9._-]*)@[0-9a-f]{{{REVISION_CHARS}}}\Z")

_Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=NAME_CHARS)]
_Text = Annotated[str, Meta(max_length=4096)]
_Sha256 = Annotated[str, Meta(pattern="^([0-9a-f]{64})?$")]
_Word = Annotated[str, Meta(min_length=1, max_length=200)]


class Asked(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A deployment as somebody asks for it.

    Attributes:
        name: what clients ask for.
        source: where a worker gets the model: an https URL or a Hugging Face repository (`owner/repo`).
        sha256: digest of the file; a worker takes no other bytes. Without it the repository's commit must be named
            (`owner/repo@0123…`): its files have digests there.
        file: which file of a repository.
        engine: the worker's engine; "" lets the worker choose by the file.
        options: load options of the engine.
        replicas: how many workers shall serve it.
        on: what a worker must have: `gpu` (a part of a GPU's name), `vram_gb` (the least total of one GPU), `worker`
            (its id), anything else is a label.
    """

    name: _Name
    source: Annotated[str, Meta(min_length=1, max_length=4096)]
    sha256: _Sha256 = ""
    file: _Text = ""
    engine: Annotated[str, Meta(max_length=100)] = ""
    options: dict[str, Any] = {}
    replicas: Annotated[int, Meta(ge=0, le=MAX_REPLICAS)] = 1
    on: dict[_Word, _Word] = {}

    @property
    def revision(self) -> str:
        """Name of exactly these bytes, loaded exactly so."""
        bytes_of_it = self.sha256 or self.source
        what = msgspec.json.encode([bytes_of_it, self.file, self.engine, self.options], order="deterministic")
        return hashlib.sha256(what).hexdigest()[:REVISION_CHARS]


class Deployment(msgspec.Struct, frozen=True, kw_only=True):
    """A deployment as it is kept.

    Attributes:
        current: revision that answers clients; "" until one was ready for the first time.
        served: that revision as it was asked for, while `asked` is a newer one.
        leaving: it was undeployed; the row goes when nobody who is here has anything of it.
        version: rises with every change; who changes it names the one that they saw.
        created_ms, changed_ms: by the store's clock.
    """

    asked: Asked
    current: str = ""
    served: Asked | None = None
    leaving: bool = False
    version: int = 1
    created_ms: int = 0
    changed_ms: int = 0

    @property
    def name(self) -> str:
        """What clients ask for."""
        return self.asked.name

    def of(self, revision: str) -> Asked | None:
        """What was asked for under this revision, while it is kept."""
        return next((one for one in (self.asked, self.served) if one is not None and one.revision == revision), None)


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """One worker that is to serve one revision of a deployment.

    Attributes:
        reason: why it is not ready, in a sentence.
        failures: how often in a row it could not.
        changed_ms: when it came into its state.
    """

    deployment: str
    revision: str
    worker: str
    state: PlacementState = "wanted"
    reason: str = ""
    failures: int = 0
    changed_ms: int = 0

    @property
    def model(self) -> str:
        """The worker's name of it."""
        return model_name(self.deployment, self.revision)


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A worker as the plan sees it.

    Attributes:
        connected: some replica has a session with it.
        lost_ms: for how long it has been away.
        draining: it is about to leave.
        placed: how many models of deployments it has, or is to have.
    """

    worker: str
    capabilities: Capabilities
    connected: bool = True
    lost_ms: int = 0
    draining: bool = False
    placed: int = 0

    @property
    def load(self) -> int:
        """How many models it has, its owner's included, or is to have."""
        return self.placed + sum(_REVISION.match(offer.name) is None for offer in self.capabilities.models)


def model_name(deployment: str, revision: str) -> str:
    """What workers call a revision."""
    return f"{deployment}@{revision}"


def now_called(model: str, deployments: Mapping[str, Deployment]) -> str:
    """Which model of workers a job shall wait for that waits for `model`.

    That is the revision that answers, also for jobs that came before there was one, or that come back from one that
    answers no more. A revision of what is not deployed any more is whatever bears the plain name. A name of an owner's
    own that only looks alike (`chat@home`) is left alone.
    """
    revision = _REVISION.match(model)
    name = revision[1] if revision else model
    deployment = deployments.get(name)
    if deployment is None:
        return name
    return model_name(name, deployment.current) if deployment.current else model


def why_not(asked: Asked, candidate: Candidate) -> str:
    """Why this worker may not serve it; "" when it may."""
    if not candidate.capabilities.deploys:
        return "its owner does not let a coordinator deploy there ([coordinator.deploy] of its worker.toml)"
    for key, wanted in asked.on.items():
        if reason := _lacks(key, wanted, candidate):
            return reason
    return ""


def _lacks(key: str, wanted: str, candidate: Candidate) -> str:
    gpus = candidate.capabilities.gpus
    match key:
        case "gpu":
            if any(wanted.casefold() in gpu.name.casefold() for gpu in gpus):
                return ""
            names = ", ".join(sorted({gpu.name for gpu in gpus})) or "no GPU"
            return f"it has {names}, and gpu={wanted} is wanted"
        case "worker":
            return "" if candidate.worker == wanted else f"worker={wanted} is wanted"
        case "vram_gb":
            most = max((gpu.vram_bytes for gpu in gpus), default=0) / 2**30
            return "" if most >= float(wanted) else f"its largest GPU has {most:.0f} GiB, and {wanted} are wanted"
        case _:
            has = candidate.capabilities.labels.get(key)
            if has == wanted:
                return ""
            return f"its label {key} is {has}" if has is not None else f"it has no label {key}"


def how_far(fetch: Fetch) -> str:
    """What a worker says of a model that it was ordered to serve, in words."""
    match fetch.phase:
        case "waiting":
            return "the worker fetches other models first"
        case "proving":
            return "the worker has fetched it, and loads and proves it"
        case "fetching" if fetch.total_bytes > 0:
            unit, name = (10**9, "GB") if fetch.total_bytes >= 10**9 else (10**6, "MB")
            done, total = fetch.done_bytes / unit, fetch.total_bytes / unit
            return f"the worker has fetched {done:.1f} of {total:.1f} {name}"
        case "fetching":
            return f"the worker has fetched {fetch.done_bytes / 10**6:.1f} MB, of a size that nobody told"
        case _:
            return ""


def checked(asked: Asked) -> Asked:
    """The same, when its fields fit together.

    Raises:
        FaultError: invalid_parameter, naming the field and the cure.
    """
    if asked.source.startswith("http://") or "://" in asked.source.removeprefix("https://"):
        raise refuse("invalid_parameter", "source: take an https URL or a repository (owner/repo).", "source")
    if not asked.source.startswith("https://") and (
        asked.source.startswith((".", "/", "~")) or "/" not in asked.source
    ):
        raise refuse(
            "invalid_parameter", "source: a path lies on one box only; take an https URL or owner/repo.", "source"
        )
    if not asked.sha256 and not _PINNED.search(asked.source):
        cure = "give the file's digest, or name the repository's commit (owner/repo@ and its 40 digits)"
        raise refuse("invalid_parameter", f"sha256: {cure}; otherwise two workers might serve two models.", "sha256")
    least = asked.on.get(VRAM_GB)
    if least is not None and not _is_number(least):
        raise refuse("invalid_parameter", f"on: vram_gb={least} is no number of GiB.", "on")
    return asked


def _is_number(text: str) -> bool:
    try:
        return 0 <= float(text) < 1e6
    except ValueError:
        return False
