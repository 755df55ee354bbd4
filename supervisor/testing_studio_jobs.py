"""The rules and the jobs of the studio for tests."""

from __future__ import annotations

from typing import Any

import msgspec


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """Times in seconds, and counts.

    Attributes:
        again_s: before a job that was rejected as busy or paused is offered again.
        sweep_s, dead_s: how often sessions are looked at, and how long one may be without a heartbeat.
        attempts: of a job in all.
        requests: for registration, from one address within 60 s.
    """

    again_s: float = 0.2
    sweep_s: float = 10.0
    dead_s: float = 30.0
    attempts: int = 3
    requests: int = 10


class Job(msgspec.Struct, kw_only=True):
    """One job. `ends` counts how often it came to an end: more than once is the mistake that this all is about."""

    id: str
    claim: dict[str, Any]
    kind: str
    vram_gb: float = 0.0
    state: str = "queued"
    attempts: int = 0
    worker: str = ""
    error: str = ""
    result: Any = None
    file: bytes | None = None
    fields: dict[str, str] = {}
    filename: str = ""
    mime: str = ""
    ends: int = 0
    not_before: float = 0.0
    refused_by: set[str] = set()
    reasons: list[str] = []
