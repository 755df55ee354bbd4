"""Our jobs in the words of the studio contract, and what it has no words for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from coordinator.config import load
from coordinator.server import Refusal
from coordinator.studio.claims import CliDefaults, Source, SourceFile, claim_of, kinds_of
from protocol import link_wire as wire
from protocol.faults import FaultError

SAID = [{"role": "user", "content": "hi"}]
FILE = wire.FileRef(name="audio", url="/v1/blobs/b?sig=1", size=1, sha256="0" * 64)


def task(kind: str, params: dict[str, Any], *names: str) -> dict[str, Any]:
    """The task of a claim."""
    inputs = tuple(msgspec.structs.replace(FILE, name=name) for name in names)
    offer = wire.Offer(kind=kind, model="m", params=msgspec.Raw(msgspec.msgpack.encode(params)), inputs=inputs)
    claim = claim_of("j", offer, {}, lambda url: f"http://here{url}")
    found: dict[str, Any] = claim["task"]
    return found


URL = "http://here/v1/blobs/b?sig=1"
TASKS: list[tuple[str, dict[str, Any], tuple[str, ...], dict[str, Any]]] = [
    (
        "llm",
        {
            "messages": [
                {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
            ],
            "max_tokens": 9,
            "temperature": 0,
            "top_p": 0.5,
            "stop": ["x"],
            "json_schema": {"type": "array"},
            "chat_template_kwargs": {"enable_thinking": False},
            "presence_penalty": 0,
        },
        (),
        {
            "messages": [{"role": "system", "content": "ab"}],
            "maxTokens": 9,
            "temperature": 0.0,
            "topP": 0.5,
            "stop": ["x"],
            "jsonSchema": {"type": "array"},
            "chatTemplateKwargs": {"enable_thinking": False},
        },
    ),
    ("llm", {"messages": SAID, "json_object": True}, (), {"messages": SAID, "jsonSchema": {"type": "object"}}),
    (
        "image",
        {"prompt": "p", "negative_prompt": "n", "steps": 4, "guidance": 2, "seed": 1, "strength": 0.4},
        ("image",),
        {
            "prompt": "p",
            "negativePrompt": "n",
            "initImageUrl": URL,
            "denoise": 0.4,
            "cfgScale": 2.0,
            "width": 512,
            "height": 512,
            "steps": 4,
            "seed": 1,
            "ext": "png",
        },
    ),
    (
        "audio_stt",
        {"task": "translate", "language": "de", "prompt": "p", "vad": True, "word_timestamps": True},
        ("audio",),
        {"inputUrl": URL, "language": "de", "translate": True, "prompt": "p", "vad": True, "timestamps": "word"},
    ),
    (
        "audio_tts",
        {"text": "t", "speed": 2, "language": "de"},
        (),
        {"text": "t", "voice": "default", "speed": 2.0, "language": "de", "ext": "wav"},
    ),
    (
        "video",
        {"prompt": "p", "seconds": 1, "format": "mp4"},
        ("image",),
        {"prompt": "p", "initImageUrl": URL, "seconds": 1.0, "fps": 12, "width": 320, "height": 240, "ext": "mp4"},
    ),
]


@pytest.mark.parametrize(("kind", "params", "names", "expected"), TASKS)
def test_tasks(kind: str, params: dict[str, Any], names: tuple[str, ...], expected: dict[str, Any]) -> None:
    assert task(kind, params, *names) == {"kind": kind, **expected}


UNSAID: list[tuple[str, dict[str, Any], str]] = [
    ("llm", {"prompt": "plain"}, "prompt"),
    ("llm", {"messages": SAID, "seed": 1}, "seed"),
    ("llm", {"messages": SAID, "top_k": 5}, "top_k"),
    ("llm", {"messages": SAID, "presence_penalty": 1}, "presence_penalty"),
    ("llm", {"messages": SAID, "grammar": "root ::= x"}, "grammar"),
    ("llm", {"messages": SAID, "logprobs": True}, "logprobs"),
    ("llm", {"messages": SAID, "tools": [{"type": "function"}]}, "tools"),
    ("llm", {"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
    ("llm", {"messages": [{"role": "user", "content": "x", "name": "n"}]}, "messages.0.name"),
    ("llm", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
    ("llm", {"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages.0.tool_calls"),
    ("image", {"prompt": "p", "n": 2}, "n"),
    ("image", {"prompt": "p", "quality": 5}, "quality"),
    ("video", {"prompt": "p", "steps": 5}, "steps"),
    ("video", {"prompt": "p", "seed": 5}, "seed"),
    ("audio_stt", {"prompt": [1, 2]}, "prompt"),
    ("audio_stt", {"temperature": 0.5}, "temperature"),
    ("embedding", {"input": ["x"]}, "kind"),
    ("x-own", {}, "kind"),
]


@pytest.mark.parametrize(("kind", "params", "field"), UNSAID)
def test_what_the_contract_has_no_word_for_is_named(kind: str, params: dict[str, Any], field: str) -> None:
    with pytest.raises(FaultError) as refused:
        task(kind, params, "audio")
    assert (refused.value.fault.code, refused.value.fault.field) == ("unsupported", field)


def test_a_mask_that_marks_by_white_is_theirs() -> None:
    said = task("image", {"prompt": "p", "mask_marks": "white"}, "image", "mask")
    assert said["maskUrl"] == URL
    assert task("image", {"prompt": "p", "mask_marks": "white"}).get("maskUrl") is None


def test_a_mask_is_not_left_out() -> None:
    with pytest.raises(FaultError) as refused:
        task("image", {"prompt": "p"}, "image", "mask")
    assert refused.value.fault.field == "mask"


def test_the_rest_of_a_claim() -> None:
    file = SourceFile(role="vae", url="https://there/f", filename="f", approx_bytes=5, sha256="a" * 64)
    source = Source(engine="other", files=[file], cli_defaults=CliDefaults(flow_shift=3, max_vram_gib=4))
    params = msgspec.Raw(msgspec.msgpack.encode({"prompt": "p"}))
    offer = wire.Offer(kind="image", model="m", params=params, tenant="acme", vram_gb_estimate=3.5)
    claim = claim_of("j", offer, {"m": source}, str)
    assert (claim["jobId"], claim["gameId"], claim["assetName"], claim["model"]) == ("j", "acme", "j", "m")
    assert claim["vramGbEstimate"] == 3.5
    assert claim["modelSource"] == {
        "engine": "other",
        "files": [{"role": "vae", "url": "https://there/f", "filename": "f", "approxBytes": 5, "sha256": "a" * 64}],
        "cliDefaults": {"cfgScale": 7.0, "steps": 20, "width": 512, "height": 512, "flowShift": 3, "maxVramGib": 4},
    }


def file(role: str = "model", filename: str = "f.gguf") -> SourceFile:
    """One to download."""
    return SourceFile(role=role, url="https://there/f", filename=filename)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "kinds"),
    [
        (Source(engine="llama-cpp"), ()),
        (Source(engine="llama-cpp", kinds=["llm"]), ()),
        (Source(engine="llama-cpp", files=[file()]), ("llm",)),
        (Source(engine="sd-cpp", files=[file("diffusion-model")]), ("image",)),
        (Source(engine="sd-cpp", files=[file()], kinds=["video", "image"]), ("video", "image")),
        (Source(engine="parakeet", files=[file()]), ("audio_stt",)),
        (Source(engine="onnx", files=[file("model", "f.onnx")]), ()),
        (Source(engine="onnx", files=[file("model", "f.onnx")], kinds=["audio_tts"]), ("audio_tts",)),
        (Source(files=[file()]), ("llm",)),
        (Source(files=[file(), file("text-encoder-vision", "p.gguf")]), ("llm",)),
        (Source(files=[file("diffusion-model"), file("vae", "v")]), ("image",)),
        (Source(files=[file(), file("vae", "v")]), ()),
        (Source(files=[file("model", "f.safetensors")]), ()),
    ],
)
def test_what_a_model_is_for_is_said_or_told_by_its_engine_or_its_files(source: Source, kinds: tuple[str, ...]) -> None:
    assert kinds_of(source) == kinds


def test_sources_come_from_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "coordinator.toml"
    path.write_text(
        '[studio_models."sd xl"]\nengine = "sd-cpp"\ncli_defaults = { steps = 8, chat_template_kwargs = { a_b = 1 } }\n'
        '[[studio_models."sd xl".files]]\nrole = "model"\nurl = "https://there/f"\nfilename = "f.gguf"\n'
    )
    source = load(path).studio_models["sd xl"]
    params = msgspec.Raw(msgspec.msgpack.encode({"prompt": "p"}))
    claim = claim_of("j", wire.Offer(kind="image", model="sd xl", params=params), {"sd xl": source}, str)
    assert claim["modelSource"]["files"][0]["filename"] == "f.gguf"
    assert claim["modelSource"]["cliDefaults"]["steps"] == 8
    assert claim["modelSource"]["cliDefaults"]["chatTemplateKwargs"] == {"a_b": 1}
    path.write_text('[studio_models.x]\nkinds = ["llm", "dance"]\n')
    with pytest.raises(Refusal, match=r"kinds|dance"):
        load(path)
    path.write_text('[studio_models.x]\nfiles = [{ role = "modle", url = "https://x", filename = "f" }]\n')
    with pytest.raises(Refusal, match="modle"):
        load(path)
