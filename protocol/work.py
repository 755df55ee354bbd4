"""Task kinds, their parameters with ranges, their results and what is counted.

This is the first of the two checks that every request passes: sizes, ranges and shapes, judged by the
coordinator without a model. What needs the model (grammar, vocabulary, context, voices) is the engine's
`validate` step. `parse_params` names the field that is wrong.
"""

from __future__ import annotations

import enum
import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from protocol.faults import FaultError, refuse
from protocol.ranges import MAX_AUDIO_BYTES as MAX_AUDIO_BYTES
from protocol.ranges import MAX_BATCH as MAX_BATCH
from protocol.ranges import MAX_IMAGE_BYTES as MAX_IMAGE_BYTES
from protocol.ranges import MAX_INPUT_BYTES as MAX_INPUT_BYTES
from protocol.ranges import MAX_MESSAGES as MAX_MESSAGES
from protocol.ranges import MAX_PIXELS as MAX_PIXELS
from protocol.ranges import MAX_SIDE as MAX_SIDE
from protocol.ranges import MAX_STOP as MAX_STOP
from protocol.ranges import MAX_TEXT_CHARS as MAX_TEXT_CHARS
from protocol.ranges import MAX_VIDEO_FRAMES as MAX_VIDEO_FRAMES
from protocol.ranges import MIN_SIDE as MIN_SIDE
from protocol.ranges import embedding_input, finite, multiple_of_8


class Kind(enum.StrEnum):
    """The task kinds. Kinds named `x-…` belong to engines of other repositories and carry free-form JSON."""

    LLM = "llm"
    EMBEDDING = "embedding"
    RERANK = "rerank"
    AUDIO_STT = "audio_stt"
    AUDIO_TTS = "audio_tts"
    IMAGE = "image"
    VIDEO = "video"
    COMMAND = "command"


# ---- types with ranges --------------------------------------------------------------------------------------

_Text = Annotated[str, Meta(max_length=MAX_TEXT_CHARS)]
_Prompt = Annotated[str, Meta(min_length=1, max_length=100_000)]
_Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
_Side = Annotated[int, Meta(ge=MIN_SIDE, le=MAX_SIDE)]
_Steps = Annotated[int, Meta(ge=1, le=500)]
_Guidance = Annotated[float, Meta(ge=0, le=50)]
_TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]


class Params(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all parameters. Unknown fields are refused by name: a misspelt option must not be ignored."""


# ---- llm ---------------------------------------------------------------------------------------------------


class Message(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One chat message, in OpenAI's shape; text parts are joined by the engine, other parts are refused."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: _Text | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class LlmParams(Params, frozen=True):
    """Chat (`messages`) or plain completion (`prompt`): exactly one of the two.

    `json_schema` constrains the answer, `grammar` is GBNF, `tools` and `tool_choice` are OpenAI's.
    `max_tokens` None means: up to the end of the context.
    """

    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)] | None = None
    prompt: _Text | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=10_000_000)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=10_000)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    seed: _Seed | None = None
    stop: Annotated[list[Annotated[str, Meta(min_length=1, max_length=1000)]], Meta(max_length=MAX_STOP)] = []
    tools: Annotated[list[dict[str, Any]], Meta(max_length=512)] = []
    tool_choice: str | dict[str, Any] | None = None
    json_schema: dict[str, Any] | None = None
    json_object: bool = False
    grammar: Annotated[str, Meta(max_length=200_000)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] = 0
    chat_template_kwargs: dict[str, Any] = {}

    def __post_init__(self) -> None:
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("messages: give exactly one of `messages` and `prompt`")
        if self.json_schema is not None and self.grammar is not None:
            raise ValueError("grammar: give at most one of `json_schema` and `grammar`")
        finite(self, "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty")


class Delta(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What a chunk adds to the answer; `tool_calls` in OpenAI's streaming shape (with `index`)."""

    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] = []


class LlmChunk(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Data of a `chunk` of kind llm."""

    delta: Delta = Delta()
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None


class LlmResult(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """The whole answer, also after streaming. Usage is in the result frame: prompt_tokens, completion_tokens."""

    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] = []
    finish_reason: str = "stop"
    logprobs: dict[str, Any] | None = None


# ---- embedding, rerank -------------------------------------------------------------------------------------


class EmbeddingParams(Params, frozen=True):
    """A batch of texts, or of token id lists."""

    input: list[Any]
    dimensions: Annotated[int, Meta(ge=1, le=65_536)] | None = None

    def __post_init__(self) -> None:
        embedding_input(self.input)


class EmbeddingResult(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """`vectors`: float32 little-endian, row-major, shape (count, dimensions); every row has length 1."""

    count: int
    dimensions: int
    vectors: bytes


class RerankParams(Params, frozen=True):
    """Score `documents` against `query`."""

    query: Annotated[str, Meta(min_length=1, max_length=100_000)]
    documents: Annotated[list[_Text], Meta(min_length=1, max_length=MAX_BATCH)]
    top_n: Annotated[int, Meta(ge=1, le=MAX_BATCH)] | None = None


class RerankResult(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """`results`: [{"index": i, "relevance_score": s}], best first."""

    results: list[dict[str, float]]


# ---- audio -------------------------------------------------------------------------------------------------


class SttParams(Params, frozen=True):
    """Transcribe (or translate into English) the input file named "audio".

    Attributes:
        language: ISO code, or None to detect it.
        prompt: text, or token ids, that precedes the first window.
        vad: drop silence before transcription.
        chunk_length_s: window length; the model's own when None.
    """

    task: Literal["transcribe", "translate"] = "transcribe"
    language: Annotated[str, Meta(pattern=r"^[a-z]{2,3}$")] | None = None
    prompt: Annotated[str, Meta(max_length=10_000)] | Annotated[list[_TokenId], Meta(max_length=448)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=1)] = 0.0
    beam_size: Annotated[int, Meta(ge=1, le=16)] = 5
    word_timestamps: bool = False
    vad: bool = False
    chunk_length_s: Annotated[int, Meta(ge=1, le=30)] | None = None

    def __post_init__(self) -> None:
        finite(self, "temperature")


class Word(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One word; times in seconds from the start of the audio."""

    word: str
    start: float
    end: float
    probability: float = 0.0


class Segment(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One segment; times in seconds from the start of the audio."""

    id: int
    start: float
    end: float
    text: str
    tokens: list[int] = []
    temperature: float = 0.0
    avg_logprob: float = 0.0
    compression_ratio: float = 0.0
    no_speech_prob: float = 0.0
    seek: int = 0
    words: list[Word] = []


class SttChunk(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Data of a `chunk` of kind audio_stt: one finished segment."""

    segment: Segment


class SttResult(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Transcript of `duration` seconds of audio."""

    text: str
    language: str
    duration: float
    task: str = "transcribe"
    language_probability: float = 0.0
    segments: list[Segment] = []


AudioFormat = Literal["wav", "flac", "ogg", "mp3", "opus", "pcm"]

AUDIO_MIME: dict[str, str] = {
    "wav": "audio/wav",
    "flac": "audio/flac",
    "ogg": "audio/ogg",
    "opus": "audio/ogg",
    "mp3": "audio/mpeg",
    "pcm": "application/octet-stream",
}


class TtsParams(Params, frozen=True):
    """Speak `text`. `speed` 2.0 is twice as fast. "ogg" is Vorbis, "opus" is Opus in Ogg, "pcm" is s16le mono."""

    text: Annotated[str, Meta(min_length=1, max_length=100_000)]
    voice: Annotated[str, Meta(max_length=200)] = "default"
    speed: Annotated[float, Meta(ge=0.25, le=4)] = 1.0
    format: AudioFormat = "wav"
    language: Annotated[str, Meta(max_length=35)] | None = None

    def __post_init__(self) -> None:
        finite(self, "speed")
        if not self.text.strip():
            raise ValueError("text: there is nothing to say in an empty text")


class TtsChunk(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Data of a `chunk` of kind audio_tts: the next bytes of the file that is being made.

    Only of formats that are written from front to back; of others nothing is streamed, and nothing after the last
    chunk either: the file has it all.
    """

    audio: bytes


class AudioResult(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """The one output file is the audio."""

    sample_rate: int
    duration: float
    format: str


# ---- image, video ------------------------------------------------------------------------------------------

ImageFormat = Literal["png", "webp", "jpeg"]
IMAGE_MIME: dict[str, str] = {"png": "image/png", "webp": "image/webp", "jpeg": "image/jpeg"}


class ImageParams(Params, frozen=True):
    """Text to image; with an input named "image" it is the start of the diffusion, weighted by `strength`.

    With an input named "mask", of the image's size, only the places that it marks change: those that are fully
    transparent, or with `mask_marks` "white" those that are nearer to white than to black.

    Sizes are in pixels and multiples of 8, as latent diffusion needs them. `steps` and `guidance` None mean the
    model's own defaults.
    """

    prompt: _Prompt
    negative_prompt: Annotated[str, Meta(max_length=100_000)] = ""
    width: _Side = 512
    height: _Side = 512
    steps: _Steps | None = None
    guidance: _Guidance | None = None
    seed: _Seed | None = None
    n: Annotated[int, Meta(ge=1, le=16)] = 1
    strength: Annotated[float, Meta(gt=0, le=1)] = 0.75
    mask_marks: Literal["transparent", "white"] = "transparent"
    format: ImageFormat = "png"
    quality: Annotated[int, Meta(ge=1, le=100)] = 90

    def __post_init__(self) -> None:
        finite(self, "guidance", "strength")
        multiple_of_8(self.width, self.height)


class ImageResult(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One output file per image, in order; `seeds` makes each repeatable."""

    width: int
    height: int
    format: str
    seeds: list[int]


VideoFormat = Literal["webm", "mp4"]
VIDEO_MIME: dict[str, str] = {"webm": "video/webm", "mp4": "video/mp4"}


class VideoParams(Params, frozen=True):
    """Text to video; an input named "image" is the start image. Frame count = round(seconds * fps)."""

    prompt: _Prompt
    negative_prompt: Annotated[str, Meta(max_length=100_000)] = ""
    width: _Side = 320
    height: _Side = 240
    seconds: Annotated[float, Meta(gt=0, le=600)] = 2.0
    fps: Annotated[int, Meta(ge=1, le=60)] = 12
    steps: _Steps | None = None
    guidance: _Guidance | None = None
    seed: _Seed | None = None
    strength: Annotated[float, Meta(gt=0, le=1)] = 0.75
    format: VideoFormat = "webm"

    def __post_init__(self) -> None:
        finite(self, "guidance", "strength", "seconds")
        multiple_of_8(self.width, self.height)
        if not 1 <= self.frames <= MAX_VIDEO_FRAMES:
            raise ValueError(f"seconds: {self.frames} frames are not between 1 and {MAX_VIDEO_FRAMES}")

    @property
    def frames(self) -> int:
        """How many frames the video has."""
        return round(self.seconds * self.fps)


class VideoResult(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """The one output file is the video."""

    width: int
    height: int
    frames: int
    fps: int
    format: str
    codec: str
    seed: int


# ---- command, x-… ------------------------------------------------------------------------------------------

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}\Z")


class CommandParams(Params, frozen=True):
    """A job for a program that the operator configured; the caller never names the program.

    Attributes:
        args: values for the `{name}` places of the operator's argv template.
        env: environment variables; only names that the operator allows are taken.
        config: content of the job config file; text as it is, anything else as JSON.
    """

    args: dict[str, str | int | float | bool] = {}
    env: dict[str, str] = {}
    config: Any = None

    def __post_init__(self) -> None:
        for name in self.env:
            if not _ENV_NAME.match(name):
                raise ValueError(f"env: {name!r} is not a name of an environment variable")
        for name, value in [*self.args.items(), *self.env.items()]:
            if isinstance(value, str) and "\0" in value:
                raise ValueError(f"args: the value of {name!r} holds a NUL byte")


class CommandResult(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """The program ended with 0. Output files are what it left in the attempt's folder."""

    exit_code: int
    output_tail: list[str] = []


class FreeResult(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Result of a kind named `x-…`: any JSON."""

    output: Any = None


PARAMS: dict[str, type[Params]] = {
    Kind.LLM: LlmParams,
    Kind.EMBEDDING: EmbeddingParams,
    Kind.RERANK: RerankParams,
    Kind.AUDIO_STT: SttParams,
    Kind.AUDIO_TTS: TtsParams,
    Kind.IMAGE: ImageParams,
    Kind.VIDEO: VideoParams,
    Kind.COMMAND: CommandParams,
}

RESULTS: dict[str, type[msgspec.Struct]] = {
    Kind.LLM: LlmResult,
    Kind.EMBEDDING: EmbeddingResult,
    Kind.RERANK: RerankResult,
    Kind.AUDIO_STT: SttResult,
    Kind.AUDIO_TTS: AudioResult,
    Kind.IMAGE: ImageResult,
    Kind.VIDEO: VideoResult,
    Kind.COMMAND: CommandResult,
}

# Input files by kind: name -> required.
INPUTS: dict[str, dict[str, bool]] = {
    Kind.AUDIO_STT: {"audio": True},
    Kind.IMAGE: {"image": False, "mask": False},
    Kind.VIDEO: {"image": False},
}

# Keys of `usage` in results; all are numbers that may be summed. `compute_ms`: milliseconds that the engine had the
# run, its input already there and its model loaded; runs that share an engine count their own time each.
USAGE_KEYS = (
    "prompt_tokens",
    "completion_tokens",
    "cached_tokens",
    "audio_seconds",
    "characters",
    "images",
    "frames",
    "documents",
    "compute_ms",
)


# Made before there is a second thread: msgspec finds out about a struct when it is first decoded, and two threads that
# do so at once may crash the process (SIGSEGV in 0.22; two runs of an engine that had just loaded).
_DECODERS: dict[str, msgspec.msgpack.Decoder[Any]] = {
    kind: msgspec.msgpack.Decoder(params) for kind, params in PARAMS.items()
}
_FREE: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(dict[str, Any])


def is_free_kind(kind: str) -> bool:
    """Whether `kind` belongs to an engine of another repository (`x-…`)."""
    return re.fullmatch(r"x-[a-z0-9][a-z0-9_-]{0,62}", kind) is not None


def is_kind(kind: str) -> bool:
    """Whether `kind` may be submitted at all."""
    return kind in PARAMS or is_free_kind(kind)


def parse_params(kind: str, value: Any) -> Any:
    """Check parameters against their ranges and return the struct (a dict for kinds named `x-…`).

    Args:
        kind: the task kind.
        value: an object decoded from JSON, or `msgspec.Raw` holding msgpack.

    Raises:
        FaultError: code `invalid_parameter` with the field's dotted name, or `unsupported` for the kind.
    """
    if not is_kind(kind):
        raise refuse("unsupported", f"There is no task kind named {kind!r}.", "kind")
    decoder = _FREE if is_free_kind(kind) else _DECODERS[kind]
    try:
        return decoder.decode(value) if isinstance(value, msgspec.Raw) else msgspec.convert(value, type=decoder.type)
    except msgspec.MsgspecError as error:
        raise _named(str(error)) from None
    except RecursionError:
        raise refuse("invalid_parameter", "The parameters are nested too deeply.", "params") from None
    except UnicodeDecodeError:
        what = "The parameters hold text that is not Unicode, half of a surrogate pair for example."
        raise refuse("invalid_parameter", what, "params") from None


_PATH = re.compile(r"^(?P<what>.*?)(?: - at `\$(?P<path>[^`]*)`)?$", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>[^`]*)`")
_MISSING = re.compile(r"Object missing required field `(?P<name>[^`]*)`")
_OURS = re.compile(r"^(?P<name>[a-z_]+): (?P<what>.*)$", re.DOTALL)


def _named(text: str) -> FaultError:
    """Turn msgspec's sentence into ours, with the field's name taken out of it."""
    match = _PATH.match(text)
    what, path = (match["what"], match["path"] or "") if match else (text, "")
    field = path.replace("[...]", "").strip(".")
    for pattern in (_UNKNOWN, _MISSING, _OURS):
        if found := pattern.search(what):
            field = ".".join(part for part in (field, found["name"]) if part)
            what = found["what"] if pattern is _OURS else what
            break
    sentence = what[:1].upper() + what[1:]
    return refuse("invalid_parameter", f"{field}: {sentence}" if field else sentence, field or None)
