from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.link.dialects import studio_frames as frames

CLAIM = {
    "jobId": "j",
    "gameId": "g",
    "assetName": "a",
    "model": "m",
    "vramGbEstimate": 3.5,
    "task": {"kind": "image", "prompt": "x", "ofTomorrow": 1},
    "modelSource": {"engine": "sd-cpp", "files": [{"role": "vae"}], "cliDefaults": {"mmap": True}},
}


def offer(**change: object) -> str:
    claim = {**CLAIM, **change}
    return json.dumps({"type": "offer", "claim": {key: value for key, value in claim.items() if value is not None}})


@pytest.mark.parametrize(
    ("text", "frame"),
    [
        ('{"type":"welcome","workerId":"w","serverTime":"t","x":1}', frames.Welcome(worker_id="w", server_time="t")),
        ('{"type":"heartbeatAck"}', frames.HeartbeatAck()),
        ('{"type":"completeAck","jobId":"j"}', frames.CompleteAck(job_id="j")),
        ('{"type":"failAck","jobId":"j"}', frames.FailAck(job_id="j")),
        ('{"type":"error","code":"c","message":"m"}', frames.Error(code="c", message="m")),
    ],
)
def test_what_the_server_says(text, frame):
    assert frames.read(text) == frame


def test_a_claim_with_its_defaults():
    offered = frames.read(offer())
    assert offered.job == "j"
    task = offered.claim.task
    assert (task.width, task.height, task.steps, task.ext) == (512, 512, 20, "webp")
    assert (offered.claim.vram_gb_estimate, offered.claim.model_source.engine) == (3.5, "sd-cpp")


def test_a_seed_may_have_64_bits():
    assert frames.read(offer(task={"kind": "image", "prompt": "x", "seed": 2**64 - 1})).claim.task.seed == 2**64 - 1


@pytest.mark.parametrize(
    "change",
    [
        {"task": None},
        {"modelSource": None},
        {"modelSource": {"files": []}},
        {"task": {"kind": "of-tomorrow"}},
        {"task": {"kind": "image"}},
        {"task": {"kind": "image", "prompt": "x", "denoise": 2}},
        {"vramGbEstimate": "much"},
    ],
)
def test_a_claim_that_does_not_fit_costs_its_job(change):
    offered = frames.read(offer(**change))
    assert (offered.job, offered.claim) == ("j", None)
    assert offered.reason.startswith("The claim cannot be read: ")


@pytest.mark.parametrize(
    "text",
    ["", "x", "[]", "null", '{"type":5}', '{"type":"later"}', '{"type":"offer"}', offer(jobId=None), offer(jobId="")],
)
def test_what_means_nothing_says_so(text):
    with pytest.raises(frames.Unreadable):
        frames.read(text)


_WORDS = st.sampled_from(["type", "claim", "jobId", "task", "kind", "offer"])
_ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | _WORDS,
    lambda inner: st.lists(inner) | st.dictionaries(_WORDS, inner),
)


@given(st.text() | _ANY.map(json.dumps))
def test_nothing_that_comes_raises_anything_else(text):
    try:
        frames.read(text)
    except frames.Unreadable:
        pass


def test_optional_fields_are_absent_and_not_null():
    assert json.loads(frames.encode(frames.Reject(job_id="j", reason="r"))) == {
        "type": "reject",
        "jobId": "j",
        "reason": "r",
    }
    told = json.loads(frames.encode(frames.Reject(job_id="j", reason="r", code="busy")))
    assert told["code"] == "busy"
    assert set(json.loads(frames.encode(frames.CompleteJson(job_id="j", result={})))) == {"type", "jobId", "result"}
