"""What `supervisor models pull` and its child tell each other: one request on stdin, JSON lines on stdout."""

from __future__ import annotations

from typing import Literal

import msgspec

from supervisor.model_guess import Guess

SourceKind = Literal["local", "url", "hub", "files"]


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """One of several files that are named one by one: `name` is relative to the model's folder, "/" between parts."""

    url: str
    name: str
    sha256: str = ""
    approx_bytes: int = 0


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What to fetch.

    Attributes:
        source: a path, a URL, or `owner/repo[@revision]`.
        file: for a hub: a file name, or a part of one that only one file has.
        staging: folder that collects the files; kept when the pull is interrupted.
        sha256: expected digest of the one file, lower-case hex; "" when none is known.
        said_by: who says so, for the sentence when it is another one.
        token_file: holds the token for the server; "" leaves it to HF_TOKEN and the hub's own login. Never the token
            itself: requests are short-lived, but what is not passed on cannot leak.
        files: of the kind "files", whose addresses are a stranger's: they are fetched past `pull_guard`.
        hosts: those it lets through all the same.
        limit_bytes: more than that is not fetched in all; 0 sets no limit.
        max_bytes: more than that is not fetched; 0 sets no limit.
    """

    kind: SourceKind
    source: str
    staging: str
    file: str = ""
    max_bytes: int = 0
    sha256: str = ""
    said_by: str = "--sha256"
    token_file: str = ""
    files: tuple[Wanted, ...] = ()
    hosts: tuple[str, ...] = ()
    limit_bytes: int = 0


class _Event(msgspec.Struct, frozen=True, tag_field="t", kw_only=True):
    """Base of what the child says."""


class Plan(_Event, frozen=True, tag="plan"):
    """What will be fetched; `total_bytes` is None when the server does not say."""

    files: tuple[str, ...]
    total_bytes: int | None
    origin: str  # the source with its revision, for the comment in worker.toml


class Progress(_Event, frozen=True, tag="progress"):
    """How far it is. `phase`: "fetch", "copy" or "hash"."""

    done_bytes: int
    total_bytes: int | None
    file: str
    phase: str = "fetch"


class Note(_Event, frozen=True, tag="note"):
    """A sentence for people: a retry, say."""

    text: str


class Finished(_Event, frozen=True, tag="finished"):
    """All files lie in the staging folder: relative name -> sha256 hex, and what the model seems to be."""

    files: dict[str, str]
    guess: Guess


class PullFailed(_Event, frozen=True, tag="failed"):
    """One sentence with the cure."""

    message: str


Event = Plan | Progress | Note | Finished | PullFailed
