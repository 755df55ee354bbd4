"""The tables of worker.toml that only one dialect asks for; see settings.py."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

_Seconds = Annotated[float, Meta(gt=0, le=7 * 86_400)]
_SecondsOrNever = Annotated[float, Meta(ge=0, le=7 * 86_400)]
_Gigabytes = Annotated[float, Meta(ge=0, le=1e6)]  # GiB


class StudioTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What only the dialect "studio" asks for.

    Attributes:
        vram_gb: GiB that a job's estimate may reach, at most the largest GPU where one is found; 0 takes just that.
        models: "own": those of this file; "download": a job's model is fetched, proved, served and kept, too.
        models_gb: GiB that fetched models may take on the disk; the one unused for longest goes first.
        kinds: kinds of jobs that are asked for though no model serves them yet.
        hosts: models may be fetched from these though their addresses are not public, and over plain http.
    """

    vram_gb: _Gigabytes = 0.0
    models: Literal["own", "download"] = "own"
    models_gb: Annotated[float, Meta(gt=0, le=1e6)] = 50.0
    kinds: list[Literal["image", "llm", "audio_stt", "audio_tts", "video"]] = []
    hosts: list[Annotated[str, Meta(min_length=1, max_length=253)]] = []


class GoliatTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What only the dialect "goliat" asks for.

    Attributes:
        protocol: "planned": the dashboard gives assignments; "shipped": the worker claims those of one super-study.
        machine_id: what the dashboard calls this machine; "" takes the worker's name.
        model: the model of the engine command that runs studies.
        study: name of the super-study (protocol "shipped").
        heartbeat_s: between two heartbeats; 0 takes the protocol's own: 5 planned, 30 shipped.
        poll_s: between two questions for an assignment while there is none.
        updates_per_s: most messages a second about a running study.
        env: what studies are told by environment variables; the model's options.env_allow has to name them.
        reupload: studies are told to upload results again that they find done.
        results_dir: where results stay that the dashboard has no place for; "" means goliat/results in the state
            folder. Nothing is ever removed from there.
    """

    protocol: Literal["planned", "shipped"] = "shipped"
    machine_id: Annotated[str, Meta(max_length=200)] = ""
    model: str = ""
    study: str = ""
    heartbeat_s: _SecondsOrNever = 0.0
    poll_s: _Seconds = 10.0
    updates_per_s: Annotated[float, Meta(gt=0, le=5)] = 5.0
    env: list[Literal["GOLIAT_ASSIGNMENT_ID", "GOLIAT_REUPLOAD_RESULTS"]] = msgspec.field(
        default_factory=lambda: ["GOLIAT_ASSIGNMENT_ID", "GOLIAT_REUPLOAD_RESULTS"]
    )
    reupload: bool = False
    results_dir: str = ""
