"""Task kinds as OpenAI routes, and the answers back."""

from __future__ import annotations

import base64
import binascii
import json
import math
import secrets
import struct
from typing import Any

import msgspec

from engines.runtime.contract import FaultError, Job, Outcome, refuse
from engines.server import calls, pictures
from engines.server.calls import Call
from engines.server.config import Config
from protocol import work
from protocol.faults import Fault

# What servers speak for "pcm", where they say anything at all.
PCM_RATE = 24_000

# Parameter of ours -> the feature that the operator must have claimed for the server.
_FEATURE_OF = {
    "tools": "tools",
    "tool_choice": "tools",
    "json_schema": "json_schema",
    "json_object": "json_object",
    "logprobs": "logprobs",
    "top_k": "top_k",
    "min_p": "min_p",
    "grammar": "grammar",
    "chat_template_kwargs": "template",
}
_CHAT_ONLY = ("tools", "tool_choice", "json_schema", "json_object", "chat_template_kwargs")
_COPIED = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "grammar",
    "tool_choice",
)


def validate(config: Config, params: Any) -> None:
    """Refuse what this server would ignore. Raises FaultError, naming the field."""
    if isinstance(params, work.LlmParams):
        for name, feature in _FEATURE_OF.items():
            if getattr(params, name) and feature not in config.features:
                raise refuse("unsupported", f"This server does not offer {name}.", name)
            if getattr(params, name) and params.prompt is not None and name in _CHAT_ONLY:
                raise refuse("unsupported", f"{name} needs `messages`, not `prompt`.", name)
        for number, message in enumerate(params.messages or []):
            _check_parts(config, message.content, f"messages.{number}.content")
    if isinstance(params, work.ImageParams):
        for name in ("negative_prompt", "seed", "steps", "guidance"):
            if getattr(params, name) not in (None, "") and name not in config.image_fields:
                raise refuse("unsupported", f"This server does not offer {name}.", name)


def _check_parts(config: Config, content: Any, field: str) -> None:
    """Text is always fine; a picture only inline, so that no server fetches a URL of a stranger's."""
    for part in content if isinstance(content, list) else []:
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            continue
        image = part.get("image_url")
        url = image.get("url") if isinstance(image, dict) else image
        if not (part.get("type") == "image_url" and "vision" in config.features):
            raise refuse("unsupported", f"This server does not take parts of type {part.get('type')!r}.", field)
        if not (isinstance(url, str) and url.startswith("data:image/")):
            raise refuse("unsupported", "Pictures must be inline, as data:image/… URLs.", field)


def run(config: Config, name: str, call: Call, job: Job) -> Outcome:
    """Serve one job. `name` is the model's name inside the server."""
    kinds = {
        work.Kind.LLM: _llm,
        work.Kind.EMBEDDING: _embedding,
        work.Kind.RERANK: _rerank,
        work.Kind.AUDIO_TTS: _speech,
        work.Kind.IMAGE: _image,
    }
    return kinds[work.Kind(job.kind)](config, name, call, job)


# ---- llm


def _llm(config: Config, name: str, call: Call, job: Job) -> Outcome:
    """Always streamed from the server: tokens are the progress, and a cancel reaches it at once."""
    params: work.LlmParams = job.params
    chat = params.messages is not None
    answer = _Answer()
    with call.open("POST", config.route("chat" if chat else "completions"), llm_body(name, params)) as response:
        calls.checked(response)
        for event in calls.events(response.iter_bytes()):
            if event.data == "[DONE]":
                answer.done = True
                break
            chunk = answer.take(_object(event.data), chat)
            if chunk is not None:
                job.progress(answer.pieces, params.max_tokens, "decode")
                job.emit(chunk)
            job.check_cancelled()
    if call.aborted:
        job.check_cancelled()
    if not (answer.done or answer.finish_reason):
        raise FaultError(Fault("engine_failed", "The server's stream ended before the answer did.", retryable=True))
    return Outcome(body=answer.result(), usage=answer.usage)


def llm_body(name: str, params: work.LlmParams) -> dict[str, Any]:
    """The request for the chat or the completion route; holds only what the caller set."""
    body: dict[str, Any] = {"model": name, "stream": True, "stream_options": {"include_usage": True}}
    for field in _COPIED:
        if (value := getattr(params, field)) is not None:
            body[field] = value
    if params.stop:
        body["stop"] = params.stop
    if params.messages is None:
        body["prompt"] = params.prompt
        if params.logprobs:
            body["logprobs"] = max(1, params.top_logprobs)
        return body
    body["messages"] = msgspec.to_builtins(params.messages)
    if params.tools:
        body["tools"] = params.tools
    if params.json_schema is not None:
        schema = {"name": "answer", "schema": params.json_schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif params.json_object:
        body["response_format"] = {"type": "json_object"}
    if params.logprobs:
        body |= {"logprobs": True, "top_logprobs": params.top_logprobs}
    if params.chat_template_kwargs:
        body["chat_template_kwargs"] = params.chat_template_kwargs
    return body


def _object(data: str) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise refuse("engine_failed", "The server sent an event that is not a JSON object.")
    return found


class _Answer:
    """Gathers a stream of either route."""

    def __init__(self) -> None:
        self.done = False
        self.pieces = 0
        self.finish_reason = ""
        self.usage: dict[str, float] = {}
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._tools: dict[int, dict[str, Any]] = {}
        self._logprobs: list[Any] = []

    def take(self, data: dict[str, Any], chat: bool) -> work.LlmChunk | None:
        """Take one event; returns the chunk that it makes, if it makes one. Raises FaultError."""
        if data.get("error"):
            status = data["error"].get("code") if isinstance(data["error"], dict) else 500
            status = status if isinstance(status, int) else 500
            raise FaultError(calls.fault_of_error(status, json.dumps(data).encode()))
        self._count(data.get("usage"))
        choice = next(iter(data.get("choices") or []), None)
        if not isinstance(choice, dict):
            return None
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        delta = _delta(choice.get("delta") or {}) if chat else work.Delta(content=choice.get("text") or None)
        self._content.append(delta.content or "")
        self._reasoning.append(delta.reasoning_content or "")
        for call in delta.tool_calls:
            self._merge(call)
        logprobs = choice.get("logprobs") or None
        if logprobs:
            self._logprobs.append(logprobs)
        chunk = work.LlmChunk(delta=delta, finish_reason=choice.get("finish_reason"), logprobs=logprobs)
        if chunk == work.LlmChunk():  # the role alone
            return None
        self.pieces += 1
        return chunk

    def _count(self, usage: Any) -> None:
        if not isinstance(usage, dict):
            return
        for name in ("prompt_tokens", "completion_tokens"):
            if isinstance(usage.get(name), int):
                self.usage[name] = usage[name]
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict) and isinstance(details.get("cached_tokens"), int):
            self.usage["cached_tokens"] = details["cached_tokens"]

    def _merge(self, call: dict[str, Any]) -> None:
        index = call.get("index")
        whole = self._tools.setdefault(index if isinstance(index, int) else 0, {"type": "function", "function": {}})
        for name in ("id", "type"):
            if call.get(name):
                whole[name] = call[name]
        for name, text in (call.get("function") or {}).items():
            if isinstance(text, str):
                whole["function"][name] = whole["function"].get(name, "") + text

    def result(self) -> work.LlmResult:
        """The whole answer."""
        content, reasoning = "".join(self._content), "".join(self._reasoning)
        return work.LlmResult(
            content=content if content or not self._tools else None,
            reasoning_content=reasoning or None,
            tool_calls=[self._tools[index] for index in sorted(self._tools)],
            finish_reason=self.finish_reason or "stop",
            logprobs=_joined(self._logprobs),
        )


def _delta(found: dict[str, Any]) -> work.Delta:
    calls_ = found.get("tool_calls")
    return work.Delta(
        content=found.get("content"),
        reasoning_content=found.get("reasoning_content") or found.get("reasoning"),
        tool_calls=[call for call in calls_ if isinstance(call, dict)] if isinstance(calls_, list) else [],
    )


def _joined(pieces: list[Any]) -> dict[str, Any] | None:
    """Log probabilities of all chunks as one object: lists are joined, everything else is the last one's."""
    out: dict[str, Any] = {}
    for piece in pieces:
        for name, value in piece.items() if isinstance(piece, dict) else []:
            out[name] = out.get(name, []) + value if isinstance(value, list) else value
    return out or None


# ---- embedding, rerank


def _embedding(config: Config, name: str, call: Call, job: Job) -> Outcome:
    params: work.EmbeddingParams = job.params
    body: dict[str, Any] = {"model": name, "input": params.input, "encoding_format": "float"}
    if params.dimensions is not None:
        body["dimensions"] = params.dimensions
    found = call.json("POST", config.route("embeddings"), body)
    try:
        rows = {int(row["index"]): [float(value) for value in row["embedding"]] for row in found["data"]}
        vectors = [rows[number] for number in range(len(params.input))]
    except (KeyError, TypeError, ValueError):
        raise refuse("engine_failed", "The server's embeddings are not one vector of numbers per text.") from None
    dimensions = len(vectors[0])
    if params.dimensions is not None and dimensions != params.dimensions:
        raise refuse("unsupported", f"This model has {dimensions} dimensions and cannot shorten them.", "dimensions")
    packed = b"".join(_normalised(vector, dimensions) for vector in vectors)
    job.progress(len(vectors), len(vectors), "embed")
    tokens = (found.get("usage") or {}).get("prompt_tokens")
    usage: dict[str, float] = {"prompt_tokens": tokens} if isinstance(tokens, int) else {}
    result = work.EmbeddingResult(count=len(vectors), dimensions=dimensions, vectors=packed)
    return Outcome(body=result, usage=usage)


def _normalised(vector: list[float], dimensions: int) -> bytes:
    length = math.hypot(*vector)
    if len(vector) != dimensions or not math.isfinite(length) or length == 0:
        raise refuse("engine_failed", "The server sent an embedding without a direction.")
    return struct.pack(f"<{dimensions}f", *(value / length for value in vector))


def _rerank(config: Config, name: str, call: Call, job: Job) -> Outcome:
    params: work.RerankParams = job.params
    wanted = min(params.top_n or len(params.documents), len(params.documents))
    body = {"model": name, "query": params.query, "documents": params.documents, "top_n": wanted}
    found = call.json("POST", config.route("rerank"), body)
    try:
        rows = [
            {"index": float(row["index"]), "relevance_score": float(row["relevance_score"])} for row in found["results"]
        ]
    except (KeyError, TypeError, ValueError):
        raise refuse("engine_failed", "The server's ranking has no index and score per document.") from None
    if any(not 0 <= row["index"] < len(params.documents) for row in rows):
        raise refuse("engine_failed", "The server ranked a document that was not asked about.")
    rows.sort(key=lambda row: -row["relevance_score"])
    job.progress(len(rows), len(rows), "rerank")
    return Outcome(body=work.RerankResult(results=rows[:wanted]), usage={"documents": len(params.documents)})


# ---- speech, image


def _speech(config: Config, name: str, call: Call, job: Job) -> Outcome:
    params: work.TtsParams = job.params
    body: dict[str, Any] = {
        "model": name,
        "input": params.text,
        "voice": params.voice,
        "response_format": params.format,
        "speed": params.speed,
    }
    if params.language:
        body["language"] = params.language
    with call.open("POST", config.route("speech"), body) as response:
        calls.checked(response)
        data = calls.read(response)
    if not data or not pictures.is_sound(data, params.format):
        raise refuse("engine_failed", f"The server did not answer with {params.format}.")
    job.progress(1, 1, "speak")
    job.save(f"speech.{params.format}", work.AUDIO_MIME[params.format], data)
    rate, seconds = pictures.sound_length(data, params.format, PCM_RATE)
    usage: dict[str, float] = {"characters": len(params.text)}
    if seconds:
        usage["audio_seconds"] = seconds
    return Outcome(body=work.AudioResult(sample_rate=rate, duration=seconds, format=params.format), usage=usage)


def _image(config: Config, name: str, call: Call, job: Job) -> Outcome:
    """One request per picture, so that each has a seed of its own and a cancel stops between them."""
    params: work.ImageParams = job.params
    no_start_image(job)
    first = params.seed if params.seed is not None else secrets.randbits(31)
    for number in range(params.n):
        body = _image_body(config, name, params, first + number)
        found = call.json("POST", config.route("images"), body)
        try:
            item = found["data"][0]
            data = _picture_bytes(call, item)
        except (KeyError, IndexError, TypeError, ValueError, binascii.Error):
            raise refuse("engine_failed", "The server's answer holds no picture.") from None
        save_picture(job, data, number)
        job.progress(number + 1, params.n, "image")
        job.check_cancelled()
    seeds = [first + number for number in range(params.n)] if "seed" in config.image_fields else []
    return image_outcome(job, seeds)


def _image_body(config: Config, name: str, params: work.ImageParams, seed: int) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": name,
        "prompt": params.prompt,
        "n": 1,
        "size": f"{params.width}x{params.height}",
        "response_format": "b64_json",
        "output_format": params.format,
    }
    asked = {"negative_prompt": params.negative_prompt or None, "steps": params.steps, "guidance": params.guidance}
    for field, value in {**asked, "seed": seed}.items():
        if value is not None and field in config.image_fields:
            body[config.image_fields[field]] = value
    return body


def _picture_bytes(call: Call, item: dict[str, Any]) -> bytes:
    if item.get("b64_json"):
        return base64.b64decode(item["b64_json"], validate=True)
    return call.fetch(str(item["url"]))


def no_start_image(job: Job) -> None:
    """Neither API has a common way to send one. Raises FaultError."""
    if "image" in job.inputs:
        raise refuse("unsupported", "This server takes no start image.", "inputs.image")


def save_picture(job: Job, data: bytes, number: int) -> None:
    """Save a picture as an output file when it is of the asked format. Raises FaultError."""
    found = pictures.picture(data)
    if found is None:
        raise refuse("engine_failed", "The server's answer is no PNG, JPEG or WebP.")
    if found.format != job.params.format:
        raise refuse("unsupported", f"This server draws {found.format} only.", "format")
    job.save(f"image-{number}.{found.format}", work.IMAGE_MIME[found.format], data)


def image_outcome(job: Job, seeds: list[int]) -> Outcome:
    """The result of saved pictures; the size is the one of the first picture itself."""
    found = pictures.picture((job.folder / job.files[0].name).read_bytes())
    assert found is not None
    result = work.ImageResult(width=found.width, height=found.height, format=found.format, seeds=seeds)
    return Outcome(body=result, usage={"images": len(job.files)})
