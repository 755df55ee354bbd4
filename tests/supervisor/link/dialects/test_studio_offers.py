from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from protocol import link_wire as wire
from protocol import work
from protocol.ids import is_safe_id
from supervisor.intake.observed import Person
from supervisor.link.dialects import studio_frames as frames
from supervisor.link.dialects import studio_offers as offers
from supervisor.link.dialects.studio_offers import Facts, Slip, Unfit


def claim(task: dict[str, Any], engine: str = "synthetic") -> frames.Claim:
    given = {"jobId": "j", "model": "m", "vramGbEstimate": 2.5, "task": task, "modelSource": {"engine": engine}}
    offered = frames.read(json.dumps({"type": "offer", "claim": given}))
    assert isinstance(offered, frames.Offered)
    assert offered.claim is not None, offered.reason
    return offered.claim


def taken(task: dict[str, Any]) -> tuple[Any, wire.Offer, Slip]:
    """The parameters of our own, which have to pass their own check."""
    offer, slip, _left = offers.offer(claim(task), 3)
    return work.parse_params(offer.kind, offer.params), offer, slip


def test_a_picture_with_all_that_it_may_say():
    params, offer, slip = taken(
        {
            "kind": "image",
            "prompt": "p",
            "negativePrompt": "n",
            "initImageUrl": "https://x/y.png",
            "denoise": 0.5,
            "cfgScale": 3.0,
            "samplingMethod": "euler",
            "width": 640,
            "height": 0,
            "steps": 30,
            "seed": 2**64 - 1,
            "ext": "jpg",
        }
    )
    assert params == work.ImageParams(
        prompt="p",
        negative_prompt="n",
        width=640,
        height=512,
        steps=30,
        guidance=3.0,
        seed=2**63 - 1,
        strength=0.5,
        format="jpeg",
    )
    assert offer.inputs == (wire.FileRef(name="image", url="https://x/y.png", size=0, sha256=""),)
    assert (offer.kind, offer.model, offer.vram_gb_estimate) == ("image", "m", 2.5)
    assert Slip.read(offer.upload) == slip
    assert slip == Slip(job="j", attempt=3, kind="image", model="m", prompt="p", ext="jpg")


def test_defaults_are_the_wires_and_twenty_steps_are_the_models_own():
    params, _offer, _slip = taken({"kind": "image", "prompt": "p"})
    assert params == work.ImageParams(prompt="p", format="webp")
    assert params.steps is None


def test_what_is_left_to_the_model_is_told():
    _offer, _slip, left = offers.offer(claim({"kind": "image", "prompt": "p", "samplingMethod": "euler"}), 1)
    assert "samplingMethod 'euler'" in left[0]


def test_a_chat():
    params, offer, slip = taken(
        {
            "kind": "llm",
            "messages": [{"role": "user", "content": "hi"}],
            "system": "be kind",
            "stop": ["x"],
            "topP": 0.5,
            "jsonSchema": {"type": "object"},
            "reasoning": False,
            "chatTemplateKwargs": {"a": 1},
        }
    )
    assert [(message.role, message.content) for message in params.messages] == [("system", "be kind"), ("user", "hi")]
    assert (params.max_tokens, params.temperature, params.top_p, params.stop) == (512, 0.7, 0.5, ["x"])
    assert params.json_schema == {"type": "object"}
    assert params.chat_template_kwargs == {"a": 1, "enable_thinking": False}
    assert slip.prompt == "system: be kind\nuser: hi"
    assert not offer.stream


@pytest.mark.parametrize(("said", "meant"), [("en-US", "en"), ("DE", "de"), ("auto", None), ("", None), (None, None)])
def test_speech_and_its_languages(said, meant):
    task = {"kind": "audio_stt", "inputUrl": "/goods/x", "language": said, "translate": True, "timestamps": "word"}
    params, offer, _slip = taken(task)
    assert (params.language, params.task, params.word_timestamps, params.vad) == (meant, "translate", True, False)
    assert [file.name for file in offer.inputs] == ["audio"]


def test_speaking_and_filming():
    params, _offer, slip = taken({"kind": "audio_tts", "text": "t", "speed": 2, "language": "en", "ext": "mp3"})
    assert params == work.TtsParams(text="t", speed=2, language="en", format="mp3")
    assert slip.prompt == "t"
    params, _offer, _slip = taken({"kind": "video", "prompt": "p", "fps": 24, "initImageUrl": "http://x/y"})
    assert params == work.VideoParams(prompt="p", fps=24, width=512, height=512, format="mp4")


@pytest.mark.parametrize(
    ("task", "word"),
    [
        ({"kind": "image", "prompt": "p", "maskUrl": "https://x/y"}, "maskUrl"),
        ({"kind": "image", "prompt": "p", "refImageUrl": "https://x/y"}, "refImageUrl"),
        ({"kind": "image", "prompt": "p", "initImageUrl": "https://x/y", "denoise": 0}, "denoise"),
        ({"kind": "image", "prompt": "p", "initImageUrl": "ftp://x/y.png"}, "initImageUrl"),
        ({"kind": "audio_stt", "inputUrl": "file:///etc/passwd"}, "inputUrl"),
        ({"kind": "audio_stt", "inputUrl": "x", "language": "klingon!"}, "language"),
    ],
)
def test_what_cannot_be_done_here_names_the_field(task, word):
    with pytest.raises(Unfit, match=word):
        offers.offer(claim(task), 1)


def test_a_mask_is_white_where_the_picture_may_change():
    task = {"kind": "image", "prompt": "p", "initImageUrl": "data:image/png;base64,AA", "maskUrl": "/goods/mask.png"}
    params, offer, _slip = taken(task)
    assert params.mask_marks == "white"
    assert [(file.name, file.url) for file in offer.inputs] == [
        ("image", "data:image/png;base64,AA"),
        ("mask", "/goods/mask.png"),
    ]


def test_engines_are_those_of_studios_and_ours():
    task = {"kind": "audio_tts", "text": "t"}
    with pytest.raises(Unfit, match="piper"):
        offers.offer(claim(task, "piper"), 1)
    offers.offer(claim(task, "piper"), 1, {"piper"})


def test_results_in_the_shape_of_openai():
    slip = Slip(job="j", attempt=1, kind="llm", model="m")
    result = work.LlmResult(content=None, reasoning_content="because", finish_reason="length")
    told = offers.json_result(slip, msgspec.msgpack.encode(result), {"prompt_tokens": 3, "completion_tokens": 4})
    assert told["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "", "reasoning_content": "because"},
            "finish_reason": "length",
        }
    ]
    assert told["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert (told["object"], told["model"], told["elapsed_ms"]) == ("chat.completion", "m", 0)


def test_how_long_it_took_is_what_the_host_measured():
    slip, result = Slip(job="j", attempt=1, kind="llm", model="m"), msgspec.msgpack.encode(work.LlmResult(content="x"))
    assert offers.json_result(slip, result, {"compute_ms": 1234.6})["elapsed_ms"] == 1234


def test_a_body_of_another_kind_is_no_result():
    with pytest.raises(msgspec.MsgspecError):
        offers.json_result(Slip(job="j", attempt=1, kind="audio_stt", model="m"), msgspec.msgpack.encode({}), {})


def test_a_slip_of_another_dialect_is_none():
    with pytest.raises(ValueError, match="no slip"):
        Slip.read("/v1/blobs/{name}")


def native(**fields: Any) -> wire.Capabilities:
    models = (
        wire.ModelOffer(name="b", kinds=("llm", "embedding"), engine="llm"),
        wire.ModelOffer(name="a", kinds=("llm", "image"), engine="image"),
        wire.ModelOffer(name="c", kinds=("embedding",), engine="embed"),
    )
    gpus = (wire.Gpu(uuid="1", name="x", vram_bytes=24 * 2**30), wire.Gpu(uuid="2", name="x", vram_bytes=8 * 2**30))
    return wire.Capabilities(models=models, gpus=gpus, version="1.2", **fields)


def test_capabilities():
    told = offers.capabilities(native(), Facts(machine="box", user="me"), draining=False)
    assert (told.supported_models, told.task_kinds) == (["a", "b"], ["image", "llm"])
    assert told.supported_models_per_kind == {"llm": ["b", "a"], "image": ["a"]}
    assert (told.vram_total_gb, told.vram_threshold_gb) == (24, 24), "a model has to fit one GPU"
    assert (told.machine_name, told.username, told.agent_version, told.auto_enabled) == ("box", "me", "1.2", True)


@pytest.mark.parametrize(
    ("said", "gpus", "told"),
    [(12, (8,), 8), (6, (8,), 6), (0, (8,), 8), (12, (8, 24), 12), (48, (24, 24), 24), (12, (), 12), (0, (), 0)],
)
def test_no_more_memory_is_promised_than_was_measured(said, gpus, told):
    found = tuple(wire.Gpu(uuid=str(n), name="x", vram_bytes=gb * 2**30) for n, gb in enumerate(gpus))
    facts = Facts(machine="b", user="", threshold_gb=said)
    assert offers.capabilities(wire.Capabilities(gpus=found), facts, False).vram_threshold_gb == told


@pytest.mark.parametrize(("accepting", "draining"), [(False, False), (True, True)])
def test_off_while_paused_and_while_draining(accepting, draining):
    assert not offers.capabilities(native(accepting=accepting), Facts(machine="", user=""), draining).auto_enabled


@pytest.mark.parametrize(
    ("person", "only", "presence"),
    [
        (None, False, None),
        (Person(first=True), True, None),
        (Person(first=True, here=True), True, "active"),
        (Person(first=True, here=False), True, "idle"),
    ],
)
def test_whoever_sits_here_is_told_only_where_it_matters(person, only, presence):
    told = offers.capabilities(native(), Facts(machine="", user=""), False, person)
    assert told.only_when_idle is only
    assert json.loads(msgspec.json.encode(told)).get("userPresence") == presence, "absent, not null"


def test_lines_of_the_log():
    line = wire.LogLine(ts="t", level="error", message="link.attempts: it broke: badly", job="j")
    plain = wire.LogLine(ts="t", level="debug", message="no logger: said this")
    batch = offers.log_batch(wire.LogBatch(lines=(line, plain), dropped=3), "now", {})
    assert [(entry.level, entry.category, entry.message) for entry in batch.entries] == [
        ("warn", "log", "3 lines of the log were lost before these"),
        ("error", "attempts", "it broke: badly"),
        ("info", "worker", "no logger: said this"),
    ]
    assert [entry.job_id for entry in batch.entries] == [msgspec.UNSET, "j", msgspec.UNSET]


@pytest.mark.parametrize(
    "task",
    [
        {"kind": "image", "prompt": "p", "width": 10**30},
        {"kind": "image", "prompt": "p", "steps": 2**64},
        {"kind": "video", "prompt": "p", "fps": -(10**30)},
        {"kind": "llm", "messages": [{"role": "user", "content": "x"}], "maxTokens": 10**30},
        {"kind": "llm", "messages": [{"role": "user", "content": [{"n": 2**64}]}]},
    ],
)
def test_a_number_that_no_wire_carries_is_a_job_that_does_not_fit(task):
    with pytest.raises(Unfit, match="64 bits"):
        offers.offer(claim(task), 1)


@pytest.mark.parametrize("name", ["j", "job_1.2:3-x", "a" * 128])
def test_a_name_that_can_be_ours_stays(name):
    assert offers.native_job(name) == name


def test_names_that_cannot_be_ours_are_told_apart():
    names = ["", "..", "a/b", "a b", "-a", "_a", "a" * 129, "a" * 130, "\u00f6", "\x00"]
    ours = {offers.native_job(name) for name in names}
    assert len(ours) == len(names)
    assert all(is_safe_id(name) for name in ours)
    assert not {offers.native_job(name) for name in ours} & ours, "nobody can take another's place by its hash"


def test_the_slip_of_an_earlier_version_is_read():
    slip = offers.Slip.read('{"job":"j","attempt":2,"kind":"image","model":"m"}')
    assert (slip.key, slip.theirs) == (("j", 2), "j")
