"""What a client may ask for: the bodies of the routes that order something. Every field is bounded."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from supervisor.intake.holds import Source

LONGEST_S = 366 * 86_400.0
_Seconds = Annotated[float, Meta(gt=0, le=LONGEST_S)]
_Reason = Annotated[str, Meta(max_length=200)]
_Name = Annotated[str, Meta(max_length=200)]
_Text = Annotated[str, Meta(max_length=4096)]


class _Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A misspelt field is told instead of ignored."""


class Nothing(_Body, frozen=True):
    """No field at all."""


class Pause(_Body, frozen=True):
    """Take no new jobs.

    Attributes:
        for_s: for how long, s; None until `resume`.
        free_vram: end the loaded models, too.
        kind, gpu: only jobs of this task kind, or on this GPU (UUID, the beginning of one, or its number).
    """

    for_s: _Seconds | None = None
    free_vram: bool = False
    reason: _Reason = ""
    kind: _Name = ""
    gpu: _Name = ""


class Resume(_Body, frozen=True):
    """Lift the operator's hold of this scope; without one the pause of the whole worker."""

    kind: _Name = ""
    gpu: _Name = ""


class Drain(_Body, frozen=True):
    """Finish what runs, then end; with `restart` to be started again."""

    reason: _Reason = ""
    restart: bool = False


class Shutdown(_Body, frozen=True):
    """End now: what runs is given back to the coordinator."""

    reason: _Reason = ""


class PutHold(_Body, frozen=True):
    """A hold for somebody else than the operator: an update, a coordinator's agent, a script."""

    source: Source = Source.OPERATOR
    for_s: _Seconds | None = None
    mode: Literal["stop", "unload", "abort"] = "stop"
    reason: _Reason = ""
    kind: _Name = ""
    gpu: _Name = ""


class LiftHold(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Query of DELETE: which scope."""

    kind: _Name = ""
    gpu: _Name = ""


class Unload(_Body, frozen=True):
    """End the instance of a model after its last run."""

    reason: _Reason = ""


class Restart(_Body, frozen=True):
    """End the instance of a model, and load it again; with `now` its jobs are given back to the coordinator."""

    reason: _Reason = ""
    now: bool = False


class Cordon(_Body, frozen=True):
    """Take no jobs on one GPU."""

    reason: _Reason = ""
    for_s: _Seconds | None = None
    unload: bool = False


class Pull(_Body, frozen=True):
    """As the arguments of `supervisor models pull`. No token: `token_file` names a file that holds it.

    `options` is an object in JSON.
    """

    source: Annotated[str, Meta(min_length=1, max_length=4096)]
    name: _Name = ""
    engine: _Name = ""
    file: _Text = ""
    sha256: Annotated[str, Meta(pattern="^([0-9a-fA-F]{64})?$")] = ""
    token_file: _Text = ""
    options: Annotated[str, Meta(max_length=65_536)] = ""
    max_gb: Annotated[float, Meta(ge=0, le=1_000_000)] = 0.0
    offline: bool = False
    force: bool = False


class Remove(_Body, frozen=True):
    """As the arguments of `supervisor models remove`."""

    name: Annotated[str, Meta(min_length=1, max_length=200)]
    keep_files: bool = False


class CancelJob(_Body, frozen=True):
    """Why a job is cancelled."""

    reason: _Reason = ""


class LogLevel(_Body, frozen=True):
    """Another log level; with `for_s` for a while only."""

    level: Literal["debug", "info", "warning", "error"]
    for_s: _Seconds | None = None


class Register(_Body, frozen=True):
    """Where this worker shall get its jobs.

    Attributes:
        url: ws:// or wss:// address of the coordinator.
        token: bearer token of this worker; written to a file of mode 0600, never logged, never answered.
        token_file: the file that holds it already, instead of `token`.
        tls_ca: PEM file to trust for wss://.
        check: try the way in before anything is written.
    """

    url: Annotated[str, Meta(pattern=r"^wss?://[^\s]+$", max_length=2048)]
    token: Annotated[str, Meta(max_length=65_536)] = ""
    token_file: _Text = ""
    tls_ca: _Text = ""
    check: bool = True
