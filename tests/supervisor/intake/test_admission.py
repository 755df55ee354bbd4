from __future__ import annotations

from typing import Any

import msgspec
import pytest

from protocol.link_wire import FileRef, Offer
from supervisor.intake.admission import QUEUE_AHEAD, ModelState, Refuse, Situation, Take, admit

MODELS = {
    "chat": ModelState(kinds=("llm",), slots=2),
    "ears": ModelState(kinds=("audio_stt",)),
    "broken": ModelState(kinds=("llm",), available=False, reason="it cannot be loaded"),
}
CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def offer(kind: str = "llm", model: str = "chat", params: object = CHAT, **fields: Any) -> Offer:
    return Offer(kind=kind, model=model, params=msgspec.Raw(msgspec.msgpack.encode(params)), **fields)


def verdict(given: Offer, job: str = "job_1", attempt: int = 1, **fields: Any):
    return admit(given, job, attempt, Situation(models=fields.pop("models", MODELS), **fields))


def ref(name: str = "audio", size: int = 10) -> FileRef:
    return FileRef(name=name, url="/x", size=size, sha256="0" * 64)


def test_a_good_offer_is_taken():
    assert verdict(offer()) == Take()
    assert verdict(offer("audio_stt", "ears", {}, inputs=(ref(),))) == Take()


def test_slots_and_a_small_queue_are_the_limit():
    for taken in range(2 + QUEUE_AHEAD):
        models = {"chat": ModelState(kinds=("llm",), slots=2, taken=taken)}
        assert verdict(offer(), models=models) == Take()
    full = {"chat": ModelState(kinds=("llm",), slots=2, taken=2 + QUEUE_AHEAD)}
    refused = verdict(offer(), models=full)
    assert isinstance(refused, Refuse)
    assert refused.code == "busy"
    assert refused.retry_after_ms > 0


@pytest.mark.parametrize(
    ("given", "code", "words"),
    [
        (offer(model="gone"), "unknown_model", "no model 'gone'"),
        (offer(model="broken"), "unknown_model", "it cannot be loaded"),
        (offer(kind="image"), "unsupported", "does not serve 'image'"),
        (offer(params={"messages": []}), "bad_offer", "messages"),
        (offer(params={**CHAT, "temperatur": 1}), "bad_offer", "temperatur"),
        (Offer(kind="llm", model="chat", params=msgspec.Raw(b"\xc1")), "bad_offer", ""),
        (offer("audio_stt", "ears", {}, inputs=(ref(), ref())), "bad_offer", "not distinct"),
        (offer("audio_stt", "ears", {}, inputs=(ref("../x"),)), "bad_offer", "not distinct plain names"),
        (offer("audio_stt", "ears", {}, inputs=(ref(size=2**40),)), "too_large", "exceeds"),
        (offer("audio_stt", "ears", {}, inputs=(ref(size=-1),)), "too_large", "exceeds"),
        (offer(vram_gb_estimate=float("nan")), "bad_offer", "no amount of memory"),
        (offer(vram_gb_estimate=-1.0), "bad_offer", "no amount of memory"),
    ],
)
def test_what_is_refused_and_why(given, code, words):
    refused = verdict(given)
    assert isinstance(refused, Refuse)
    assert refused.code == code
    assert words in refused.reason


def test_what_a_job_says_it_needs_of_the_gpu_is_held_against_it():
    models = {"chat": ModelState(kinds=("llm",), job_vram_bytes=12 * 2**30)}
    assert verdict(offer(vram_gb_estimate=12.0), models=models) == Take()
    refused = verdict(offer(vram_gb_estimate=12.5), models=models)
    assert (refused.code, "at most 12.0 GiB" in refused.reason) == ("too_large", True)
    assert verdict(offer(vram_gb_estimate=500.0)) == Take()  # nothing is known of the GPUs


@pytest.mark.parametrize(("job", "attempt"), [("../up", 1), ("", 1), ("job", 0), ("a/b", 1)])
def test_ids_that_cannot_be_folders_are_refused(job, attempt):
    assert verdict(offer(), job, attempt).code == "bad_offer"


def test_draining_and_paused_come_before_everything_else():
    assert verdict(offer(model="gone"), draining="asked to stop", paused="for lunch").code == "draining"
    refused = verdict(offer(model="gone"), paused="for lunch", paused_ms=1234)
    assert (refused.code, refused.retry_after_ms) == ("paused", 1234)
    assert verdict(offer(), paused="for lunch").retry_after_ms > 0


def test_a_cordoned_kind_is_refused_and_the_others_are_not():
    held = {"rerank": "held by the operator (rerank: a bad release)"}
    models = {"chat": ModelState(kinds=("llm", "rerank"), held=held, held_ms={"rerank": 1234})}
    assert verdict(offer(), models=models) == Take()
    refused = verdict(offer("rerank"), models=models)
    assert (refused.code, refused.retry_after_ms) == ("busy", 1234)
    assert refused.reason == (
        "The worker takes no rerank jobs for 'chat': held by the operator (rerank: a bad release)."
    )
    for_good = {"chat": ModelState(kinds=("rerank",), held=held)}
    assert verdict(offer("rerank"), models=for_good).retry_after_ms > 0


def test_a_model_that_is_not_available_now_may_be_asked_for_again():
    refused = verdict(offer(model="broken"))
    assert refused.code == "unknown_model"
    assert refused.retry_after_ms > 0
    assert not verdict(offer(model="gone")).retry_after_ms


@pytest.mark.parametrize("attempt", [0, -1, 2**31, 2**63, 2**64 - 1])
def test_a_number_that_no_records_can_hold_is_no_attempt(attempt: int):
    refused = verdict(offer(), attempt=attempt)
    assert isinstance(refused, Refuse)
    assert refused.code == "bad_offer"
