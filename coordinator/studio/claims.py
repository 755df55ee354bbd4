"""Our jobs as claims of the studio contract: the task with its parameters, and where the model's files are.

Not everything that our parameters can ask for has a word there. What has none is refused by name instead of left out,
so that nobody gets an answer to another question than he asked; a worker that speaks our own protocol takes such a job.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from protocol import link_wire as wire
from protocol.faults import FaultError, refuse
from protocol.work import ImageParams, Kind, LlmParams, Message, SttParams, TtsParams, VideoParams, parse_params

_Name = Annotated[str, Meta(min_length=1, max_length=200)]
_Url = Annotated[str, Meta(pattern=r"^https?://", max_length=4000)]
_Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


class SourceFile(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One file of a model that workers may download."""

    role: Literal["diffusion-model", "text-encoder", "text-encoder-vision", "vae", "lora", "model"]
    url: _Url
    filename: _Name
    approx_bytes: Annotated[int, Meta(ge=0)] | None = None
    sha256: _Sha256 | None = None


class CliDefaults(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What a worker's engine takes where a job says nothing; the first four are always sent."""

    cfg_scale: float = 7.0
    steps: int = 20
    width: int = 512
    height: int = 512
    sampling_method: str | None = None
    flow_shift: float | None = None
    zero_cond_t: bool | None = None
    offload_to_cpu: bool | None = None
    mmap: bool | None = None
    max_vram_gib: float | None = None
    context_size: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class Source(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a model comes from: `[studio_models.NAME]` of coordinator.toml.

    Attributes:
        engine: the worker's name of the engine; "" is the usual one of the task kind.
        files: to download; without any, the worker has to have the model.
        kinds: what the model with these files is for: workers of these kinds are offered its jobs, whether they have
            it or not. Empty is what the engine or the files show (see `kinds_of`); where neither does, its jobs go to
            workers that have it.
    """

    engine: Annotated[str, Meta(max_length=100)] = ""
    kinds: list[Literal["image", "llm", "audio_stt", "audio_tts", "video"]] = []
    files: list[SourceFile] = []
    cli_defaults: CliDefaults = CliDefaults()


Sources = Mapping[str, Source]

# The contract names no engine for speech and films. Workers that serve these know what they run them with.
_ENGINES: dict[str, str] = {Kind.IMAGE: "sd-cpp", Kind.LLM: "llama-cpp"}
_OTHER_ENGINE = "onnx"
# The other way round: what the files of such an engine are for, where the configuration does not say.
_KINDS: dict[str, str] = {"sd-cpp": Kind.IMAGE, "llama-cpp": Kind.LLM, "parakeet": Kind.AUDIO_STT}
_ALWAYS = ("cfg_scale", "steps", "width", "height")


def kinds_of(source: Source) -> tuple[str, ...]:
    """Task kinds for which a worker can fetch a model; none where there is nothing to fetch, or nobody knows.

    What is not said is told by the engine: sd-cpp is image, llama-cpp is llm, parakeet is audio_stt. Without an engine,
    by the files: a diffusion-model is image, a model in .gguf is llm.
    """
    if not source.files or source.kinds:
        return tuple(source.kinds) if source.files else ()
    if source.engine:
        return (_KINDS[source.engine],) if source.engine in _KINDS else ()
    roles = {file.role for file in source.files}
    if "diffusion-model" in roles:
        return (Kind.IMAGE,)
    gguf = any(file.role == "model" and file.filename.lower().endswith(".gguf") for file in source.files)
    return (Kind.LLM,) if gguf and roles <= {"model", "text-encoder-vision", "lora"} else ()


def claim_of(job: str, offer: wire.Offer, sources: Sources, url: Callable[[str], str]) -> dict[str, Any]:
    """The claim of an offered job, ready for JSON.

    Args:
        job: its id.
        offer: as a native worker would get it.
        sources: by model name.
        url: makes the relative URL of an input one that the worker can fetch.

    Raises:
        FaultError: unsupported, naming what the contract has no word for.
    """
    write = _TASKS.get(offer.kind)
    if write is None:
        raise refuse("unsupported", f"The studio contract has no task kind {offer.kind}.", "kind")
    params = parse_params(offer.kind, offer.params)
    inputs = {file.name: url(file.url) for file in offer.inputs}
    task = {name: value for name, value in write(params, inputs).items() if value is not None}
    return {
        "jobId": job,
        "gameId": offer.tenant,
        "assetName": job,
        "model": offer.model,
        "vramGbEstimate": offer.vram_gb_estimate,
        "task": {"kind": offer.kind, **task},
        "modelSource": _source(offer, sources.get(offer.model, Source())),
    }


def _source(offer: wire.Offer, source: Source) -> dict[str, Any]:
    defaults = {name: getattr(source.cli_defaults, name) for name in _ALWAYS}
    return {
        "engine": source.engine or _ENGINES.get(offer.kind, _OTHER_ENGINE),
        "files": [_camel(msgspec.to_builtins(file)) for file in source.files],
        "cliDefaults": _camel({**defaults, **msgspec.to_builtins(source.cli_defaults)}),
    }


def _camel(value: Mapping[str, Any]) -> dict[str, Any]:
    """Our names of fields in the contract's case; what is inside their values stays as it is."""
    return {re.sub(r"_([a-z])", lambda found: found[1].upper(), name): inner for name, inner in value.items()}


def _no_word(params: msgspec.Struct, *names: str) -> None:
    """Refuse parameters that ask for more than their default. Raises FaultError(unsupported)."""
    defaults = {field.name: field for field in msgspec.structs.fields(params)}
    for name in names:
        value, field = getattr(params, name), defaults[name]
        usual = field.default_factory() if field.default_factory is not msgspec.NODEFAULT else field.default
        if value != usual and value != _NEUTRAL.get(name, usual):
            raise _unsaid(name)


# Values that ask for nothing, whatever the default: many clients send them.
_NEUTRAL: dict[str, Any] = {
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "top_k": 0,
    "min_p": 0,
    "tool_choice": "none",
}


def _unsaid(name: str) -> FaultError:
    return refuse("unsupported", f"{name}: The studio contract has no word for it; leave it out.", name)


# ---- tasks --------------------------------------------------------------------------------------------------


def _image(params: ImageParams, inputs: Mapping[str, str]) -> dict[str, Any]:
    _no_word(params, "n", "quality")
    mask = inputs.get("mask")
    if mask is not None and params.mask_marks != "white":  # theirs is always white where the picture may change
        raise _unsaid("mask")
    start = inputs.get("image")
    return {
        "prompt": params.prompt,
        "negativePrompt": params.negative_prompt or None,
        "initImageUrl": start,
        "maskUrl": mask,
        "denoise": params.strength if start else None,
        "cfgScale": params.guidance,
        "width": params.width,
        "height": params.height,
        "steps": params.steps,
        "seed": params.seed,
        "ext": params.format,
    }


def _video(params: VideoParams, inputs: Mapping[str, str]) -> dict[str, Any]:
    _no_word(params, "steps", "guidance", "seed", "strength")
    return {
        "prompt": params.prompt,
        "negativePrompt": params.negative_prompt or None,
        "initImageUrl": inputs.get("image"),
        "seconds": params.seconds,
        "fps": params.fps,
        "width": params.width,
        "height": params.height,
        "ext": params.format,
    }


def _tts(params: TtsParams, _inputs: Mapping[str, str]) -> dict[str, Any]:
    return {
        "text": params.text,
        "voice": params.voice,
        "speed": params.speed,
        "language": params.language,
        "ext": params.format,
    }


def _stt(params: SttParams, inputs: Mapping[str, str]) -> dict[str, Any]:
    _no_word(params, "temperature", "beam_size", "chunk_length_s")
    if isinstance(params.prompt, list):
        raise refuse("unsupported", "prompt: The studio contract takes a text, not token ids.", "prompt")
    return {
        "inputUrl": inputs["audio"],
        "language": params.language,
        "translate": True if params.task == "translate" else None,
        "prompt": params.prompt,
        "vad": True if params.vad else None,
        "timestamps": "word" if params.word_timestamps else "segment",
    }


_UNSAID_LLM = (
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "tools",
    "tool_choice",
    "grammar",
    "logprobs",
)


def _llm(params: LlmParams, _inputs: Mapping[str, str]) -> dict[str, Any]:
    """Without `max_tokens` the worker's own 512 apply: the contract has no word for "as many as there are"."""
    _no_word(params, *_UNSAID_LLM)
    if params.messages is None:
        raise refuse("unsupported", "prompt: The studio contract knows chats only; send messages.", "prompt")
    schema = params.json_schema
    if schema is None and params.json_object:
        schema = {"type": "object"}
    return {
        "messages": [_message(number, message) for number, message in enumerate(params.messages)],
        "maxTokens": params.max_tokens,
        "temperature": params.temperature,
        "topP": params.top_p,
        "stop": params.stop or None,
        "jsonSchema": schema,
        "chatTemplateKwargs": params.chat_template_kwargs or None,
    }


def _message(number: int, message: Message) -> dict[str, str]:
    field = f"messages.{number}"
    role = "system" if message.role == "developer" else message.role
    if role not in ("system", "user", "assistant") or message.tool_calls:
        raise _unsaid(f"{field}.role" if not message.tool_calls else f"{field}.tool_calls")
    if message.name is not None:
        raise _unsaid(f"{field}.name")
    content = message.content
    if isinstance(content, list):
        if not all(part.get("type") == "text" and isinstance(part.get("text"), str) for part in content):
            raise _unsaid(f"{field}.content")
        content = "".join(part["text"] for part in content)
    return {"role": role, "content": content or ""}


_TASKS: dict[str, Callable[[Any, Mapping[str, str]], dict[str, Any]]] = {
    Kind.IMAGE: _image,
    Kind.LLM: _llm,
    Kind.AUDIO_STT: _stt,
    Kind.AUDIO_TTS: _tts,
    Kind.VIDEO: _video,
}
