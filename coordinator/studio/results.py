"""What a studio worker delivers, as results of ours: chat completions, transcripts, and files with their facts.

A worker's word is input like any other: shapes are checked here, files are told by their content, and the sizes that
an answer names are read from the file where its format shows them.
"""

from __future__ import annotations

import math
import struct
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from coordinator.media import UNKNOWN, sniff
from protocol.engine_wire import OutputFile
from protocol.faults import refuse
from protocol.framing import UNDECODABLE
from protocol.link_wire import Complete
from protocol.ranges import MAX_SIDE
from protocol.work import (
    AUDIO_MIME,
    IMAGE_MIME,
    VIDEO_MIME,
    AudioResult,
    ImageResult,
    Kind,
    LlmResult,
    Segment,
    SttResult,
    VideoResult,
    Word,
)

HEAD_BYTES = 64 * 2**10  # of a file, from which its facts are read
MAX_SECONDS = 10 * 86_400.0
FINISHES = frozenset({"stop", "length", "tool_calls", "content_filter"})
_Count = Annotated[int, Meta(ge=0, le=2**53)]
_Time = Annotated[float, Meta(ge=0, le=MAX_SECONDS)]


# ---- JSON ---------------------------------------------------------------------------------------------------


class _Message(msgspec.Struct, frozen=True):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class _Choice(msgspec.Struct, frozen=True):
    message: _Message
    finish_reason: str | None = None


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: _Count = 0
    completion_tokens: _Count = 0


class _Chat(msgspec.Struct, frozen=True):
    choices: Annotated[list[_Choice], Meta(min_length=1, max_length=16)]
    usage: _Usage | None = None
    elapsed_ms: float | None = None


class _Word(msgspec.Struct, frozen=True):
    word: str
    start: _Time
    end: _Time
    probability: float = 0.0


class _Segment(msgspec.Struct, frozen=True):
    start: _Time
    end: _Time
    text: str
    words: list[_Word] = []


class _Transcript(msgspec.Struct, frozen=True):
    text: str
    language: Annotated[str, Meta(max_length=35)] | None = None
    duration: _Time = 0.0
    segments: msgspec.Raw = msgspec.Raw(b"null")


def from_json(kind: str, result: msgspec.Raw, task: str = "transcribe") -> Complete:
    """The result of a `completeJson`.

    Args:
        kind: llm or audio_stt.
        result: what came, in JSON.
        task: of a transcript: transcribe or translate.

    Raises:
        FaultError: engine_protocol, when it is not the shape that the contract names.
    """
    try:
        if kind == Kind.LLM:
            return _chat(msgspec.json.decode(result, type=_Chat))
        if kind == Kind.AUDIO_STT:
            return _transcript(msgspec.json.decode(result, type=_Transcript), task)
    except UNDECODABLE as error:
        raise refuse("engine_protocol", f"The worker's result is not one of kind {kind}: {error}.") from None
    raise refuse("engine_protocol", f"A result of kind {kind} is a file; the worker sent JSON.")


def _chat(said: _Chat) -> Complete:
    choice = said.choices[0]
    finish = choice.finish_reason or "stop"
    if finish not in FINISHES:
        raise refuse("engine_protocol", f"The worker's answer ended for the unknown reason {finish[:50]!r}.")
    message = choice.message
    result = LlmResult(
        content=message.content,
        reasoning_content=message.reasoning_content,
        tool_calls=message.tool_calls or [],
        finish_reason=finish,
    )
    usage: dict[str, float] = {}
    if said.usage is not None:
        usage = {"prompt_tokens": said.usage.prompt_tokens, "completion_tokens": said.usage.completion_tokens}
    if said.elapsed_ms is not None and math.isfinite(said.elapsed_ms) and said.elapsed_ms >= 0:
        usage["compute_ms"] = said.elapsed_ms
    return _complete(result, (), usage)


def _transcript(said: _Transcript, task: str) -> Complete:
    result = SttResult(
        text=said.text,
        language=said.language or "",
        duration=said.duration,
        task=task,
        segments=_segments(said),
    )
    return _complete(result, (), {"audio_seconds": said.duration})


def _segments(said: _Transcript) -> list[Segment]:
    """Its segments; the contract asks for none, so a transcript without any is one segment from end to end."""
    try:
        found = msgspec.json.decode(said.segments, type=list[_Segment])
    except UNDECODABLE:
        found = []
    if not found:
        found = [_Segment(start=0.0, end=said.duration, text=said.text)] if said.text else []
    return [
        Segment(
            id=number,
            start=segment.start,
            end=segment.end,
            text=segment.text,
            words=[
                Word(word=word.word, start=word.start, end=word.end, probability=word.probability)
                for word in segment.words
            ],
        )
        for number, segment in enumerate(found)
    ]


def _complete(result: msgspec.Struct, files: tuple[OutputFile, ...], usage: dict[str, float]) -> Complete:
    return Complete(result=msgspec.Raw(msgspec.msgpack.encode(result)), files=files, usage=usage)


# ---- files --------------------------------------------------------------------------------------------------

_MIMES = {Kind.IMAGE: IMAGE_MIME, Kind.AUDIO_TTS: AUDIO_MIME, Kind.VIDEO: VIDEO_MIME}
_NAMES = {Kind.IMAGE: "image-0", Kind.AUDIO_TTS: "speech", Kind.VIDEO: "video"}
_SHAPELESS = frozenset({"pcm"})  # formats whose content shows nothing


def file_name(kind: str, params: Any) -> str:
    """What the output of a job is called."""
    return f"{_NAMES[Kind(kind)]}.{params.format}"


def from_file(kind: str, params: Any, head: bytes, size: int, sha256: str) -> Complete:
    """The result of an uploaded file.

    Args:
        kind: image, audio_tts or video.
        params: of the job.
        head: the first `HEAD_BYTES` of the file.
        size: of the file, in bytes.
        sha256: of the file, in hex.

    Raises:
        FaultError: engine_protocol, when the content is of another format than was asked for.
    """
    wanted: str = params.format
    mime = _MIMES[Kind(kind)][wanted]
    if size == 0:
        raise refuse("engine_protocol", "image: The file is empty.")
    found = sniff(head)
    if wanted not in _SHAPELESS and found != mime:
        what = "of an unknown type" if found == UNKNOWN else found
        raise refuse("engine_protocol", f"image: Expected {wanted}, but the content is {what}.")
    file = OutputFile(file_name(kind, params), mime, size, sha256)
    result, usage = _FACTS[Kind(kind)](params, head, size)
    return _complete(result, (file,), usage)


def of_a_cancelled_job(kind: str, params: Any) -> Complete:
    """A result for what nobody wants any more: its file was not kept, its work is counted."""
    result, usage = _FACTS[Kind(kind)](params, b"", 0)
    return _complete(result, (), usage)


def _image(params: Any, head: bytes, _size: int) -> tuple[msgspec.Struct, dict[str, float]]:
    width, height = picture_size(head) or (params.width, params.height)
    seeds = [] if params.seed is None else [params.seed]
    return ImageResult(width=width, height=height, format=params.format, seeds=seeds), {"images": 1}


def _speech(params: Any, head: bytes, size: int) -> tuple[msgspec.Struct, dict[str, float]]:
    rate, seconds = wav_facts(head, size) if params.format == "wav" else (0, 0.0)
    result = AudioResult(sample_rate=rate, duration=seconds, format=params.format)
    return result, {"characters": len(params.text), "audio_seconds": seconds}


def _film(params: Any, _head: bytes, _size: int) -> tuple[msgspec.Struct, dict[str, float]]:
    """As it was asked for: the contract has no word for what it became."""
    result = VideoResult(
        width=params.width,
        height=params.height,
        frames=params.frames,
        fps=params.fps,
        format=params.format,
        codec="",
        seed=0,
    )
    return result, {"frames": params.frames}


_FACTS = {Kind.IMAGE: _image, Kind.AUDIO_TTS: _speech, Kind.VIDEO: _film}


def picture_size(head: bytes) -> tuple[int, int] | None:
    """Width and height in pixels as PNG, WebP or JPEG tell them; None when the head does not show them."""
    size: tuple[int, int] | None = None
    if head[:8] == b"\x89PNG\r\n\x1a\n" and len(head) >= 24:
        size = struct.unpack(">II", head[16:24])
    elif head[:4] == b"RIFF" and head[8:12] == b"WEBP" and len(head) >= 30:
        size = _webp_size(head)
    elif head[:3] == b"\xff\xd8\xff":
        size = _jpeg_size(head)
    return size if size is not None and all(1 <= side <= 4 * MAX_SIDE for side in size) else None


def _webp_size(head: bytes) -> tuple[int, int] | None:
    match head[12:16]:
        case b"VP8X":
            return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
        case b"VP8L":
            bits = int.from_bytes(head[21:25], "little")
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        case b"VP8 ":
            width, height = struct.unpack("<HH", head[26:30])
            return width & 0x3FFF, height & 0x3FFF
    return None


def _jpeg_size(head: bytes) -> tuple[int, int] | None:
    at = 2
    while at + 9 <= len(head) and head[at] == 0xFF:
        marker, length = head[at + 1], int.from_bytes(head[at + 2 : at + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", head[at + 5 : at + 9])
            return width, height
        at += 2 + max(2, length)
    return None


def wav_facts(head: bytes, size: int) -> tuple[int, float]:
    """Sample rate in Hz and length in seconds of a WAV file; (0, 0.0) where its head does not tell.

    `size` bounds what the head claims: programs that write to a pipe leave the largest number there.
    """
    at, rate, per_second = 12, 0, 0
    while at + 8 <= len(head):
        name, length = head[at : at + 4], int.from_bytes(head[at + 4 : at + 8], "little")
        if name == b"fmt " and at + 20 <= len(head):
            rate, per_second = struct.unpack("<II", head[at + 12 : at + 20])
        elif name == b"data":
            data = min(length, max(0, size - at - 8))
            seconds = data / per_second if per_second else 0.0
            return rate, min(seconds, MAX_SECONDS)
        at += 8 + length + length % 2
    return rate, 0.0
