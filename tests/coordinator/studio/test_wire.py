"""Frames of the studio contract: read in two stages, and turned into our words."""

from __future__ import annotations

import json
from typing import Any

import pytest

from coordinator.fleet import Worker
from coordinator.studio.wire import (
    UP,
    Capabilities,
    NoFrame,
    Reject,
    Unreadable,
    announced,
    bound,
    declined,
    frame,
    read_body,
    read_head,
)
from coordinator.testing_studio import capabilities
from protocol import link_wire as wire


class Nowhere:
    """A way that leads nowhere."""

    def send(self, body: wire.Body, job: str = "", attempt: int = 0) -> None:
        raise AssertionError("nothing is said here")

    def close(self, code: str, message: str) -> None:
        raise AssertionError("nothing is closed here")


def said(**more: Any) -> Capabilities:
    """As they come over the socket."""
    text = json.dumps({"type": "heartbeat", "capabilities": capabilities(**more)})
    found: Capabilities = read_body(read_head(text), text).capabilities
    return found


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"type":null}', '{"type":"accept"}', "[" * 10**5])
def test_what_is_no_frame(text: str) -> None:
    with pytest.raises(NoFrame):
        read_head(text)


@pytest.mark.parametrize("type_", sorted(set(UP) - {"readyForMore", "accept", "reject"}))
def test_a_body_that_does_not_fit_is_told_apart_from_no_frame(type_: str) -> None:
    text = json.dumps({"type": type_, "jobId": "j", "capabilities": 5, "error": [], "entries": "x"})
    head = read_head(text)
    assert head.job_id == "j"
    with pytest.raises(Unreadable, match=type_):
        read_body(head, text)


def test_models_by_kind_are_models_with_kinds() -> None:
    found = announced(said(supportedModelsPerKind={"llm": ["b", "a"], "image": ["b"], "dance": ["c"]}))
    assert [(offer.name, offer.kinds, offer.slots) for offer in found.models] == [
        ("a", ("llm",), 1),
        ("b", ("image", "llm"), 1),
    ]
    assert (found.machine, found.version, found.accepting, found.reason) == ("studio-box", "0.4.5", True, "")


def test_models_that_claims_bring_are_served_by_who_names_their_kind() -> None:
    fetched = {"new": ("llm", "image"), "a": ("llm",), "film": ("video",)}
    found = announced(said(taskKinds=["llm"], supportedModelsPerKind={"llm": ["a"]}), fetched=fetched)
    assert [(offer.name, offer.kinds) for offer in found.models] == [("a", ("llm",)), ("new", ("llm",))]
    bare = announced(said(taskKinds=["video"], supportedModelsPerKind={}, supportedModels=[]), fetched=fetched)
    assert [(offer.name, offer.kinds) for offer in bare.models] == [("film", ("video",))]
    old = announced(said(taskKinds=[], supportedModelsPerKind={}, supportedModels=["m"]), fetched=fetched)
    assert [offer.name for offer in old.models] == ["m"], "too old to be told where the files are"


@pytest.mark.parametrize("name", ["", "x" * 201, "a\0b"])
def test_names_that_cannot_be_are_left_out(name: str) -> None:
    assert announced(said(supportedModelsPerKind={"llm": [name]})).models == ()


def test_only_kinds_that_are_named_count() -> None:
    assert [offer.kinds for offer in announced(said(taskKinds=["llm"])).models] == [("llm",)]
    old = announced(said(supportedModelsPerKind={}, taskKinds=[], supportedModels=["m"]))
    assert [(offer.name, offer.kinds) for offer in old.models] == [("m", ("image",))]


@pytest.mark.parametrize(
    ("more", "accepting"),
    [
        ({"autoEnabled": False}, False),
        ({"onlyWhenIdle": True}, False),
        ({"onlyWhenIdle": True, "userPresence": "active"}, False),
        ({"onlyWhenIdle": True, "userPresence": "idle"}, True),
        ({"userPresence": "active"}, True),
        ({"userPresence": None}, True),
    ],
)
def test_who_accepts(more: dict[str, Any], accepting: bool) -> None:
    found = announced(said(**more))
    assert (found.accepting, bool(found.reason)) == (accepting, not accepting)
    assert announced(said(**more), "lunch").reason == "lunch"


def test_bounds_of_a_worker() -> None:
    worker = Worker("w", Nowhere(), announced(said()))
    bound(worker, said(vramThresholdGb=7.5))
    assert (worker.at_once, worker.vram_gb, worker.slots) == (1, 7.5, 1)


@pytest.mark.parametrize(
    ("reject", "code"),
    [
        (Reject(reason="x", code="busy"), "busy"),
        (Reject(reason="x", code="paused"), "paused"),
        (Reject(reason="x", code="another"), "unsupported"),
        (Reject(reason="Worker BUSY"), "busy"),
        (Reject(reason="worker already has an in-flight job"), "busy"),
        (Reject(reason="worker paused by operator"), "paused"),
        (Reject(reason="only when idle: the person is using this computer"), "paused"),
        (Reject(reason="unknown engine slug"), "unsupported"),
        (Reject(), "unsupported"),
    ],
)
def test_rejects(reject: Reject, code: str) -> None:
    assert declined(reject).code == code


def test_frames_are_json_with_a_type() -> None:
    assert json.loads(frame("welcome", workerId="w")) == {"type": "welcome", "workerId": "w"}
