"""The synthetic engine: every task kind, deterministic, without any library.

It proves the road (wire, scheduling, streaming, cancel), not a model. An answer of this engine must never pass
for a real one, so it loads only models whose name starts with "synthetic".
"""

from __future__ import annotations

import hashlib
import math
import platform
import re
import struct
import time
import wave
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import msgspec

from engines.runtime.contract import (
    CancelledRun,
    Case,
    Claims,
    Engine,
    Fixture,
    Job,
    LoadProgress,
    Model,
    Outcome,
    Ready,
    known_options,
    option,
    refuse,
)
from engines.synthetic import media
from protocol import work

NAME_PREFIX = "synthetic"
OPTIONS = ("slots", "load_s", "tokens", "delay_ms", "dimensions", "vram_bytes", "gpu")
# What the simulated GPU reader counts as taken for as long as the instance's folder is there.
VRAM_FILE = "vram.json"
NOTE_S = 0.05
MAX_NOTES = 400
LOAD_STEP_S = 0.05


def require_synthetic(model: Model) -> None:
    """Refuse every model that is not named synthetic. Raises FaultError."""
    if not model.name.startswith(NAME_PREFIX):
        raise refuse(
            "load_failed",
            f"The synthetic engine never serves {model.name!r}: its answers are made up. "
            f"Name the model {NAME_PREFIX}-… or choose a real engine.",
            "name",
        )


class SyntheticEngine(Engine):
    """Load options: slots, load_s (slow load), tokens (length of answers), delay_ms (per token), dimensions.

    `gpu` (a UUID) and `vram_bytes` pretend to take that much memory of that GPU: after the load the instance's folder
    holds vram.json, `{"uuid": str, "bytes": int}`, which the simulated GPU reader counts.
    """

    name: ClassVar[str] = "synthetic"
    kinds: ClassVar[tuple[str, ...]] = tuple(str(kind) for kind in work.Kind)

    @classmethod
    def probe(cls, backend: str) -> Claims:
        """Nothing but Python is needed."""
        return Claims(versions={"python": platform.python_version()})

    @classmethod
    def fixture(cls, backend: str) -> Fixture:
        """One case of each kind that needs no input file."""
        return _fixture()

    def load(self, model: Model, scratch: Path, progress: LoadProgress) -> Ready:
        """Take the options; wait `load_s` with progress."""
        require_synthetic(model)
        known_options(model, OPTIONS)
        self._tokens = option(model, "tokens", Annotated[int, msgspec.Meta(ge=0, le=10_000_000)], 0)
        self._delay_s = option(model, "delay_ms", Annotated[float, msgspec.Meta(ge=0, le=60_000)], 0.0) / 1000
        self._dimensions = option(model, "dimensions", Annotated[int, msgspec.Meta(ge=1, le=65_536)], 64)
        slots = option(model, "slots", Annotated[int, msgspec.Meta(ge=1, le=1024)], 4)
        load_s = option(model, "load_s", Annotated[float, msgspec.Meta(ge=0, le=3600)], 0.0)
        steps = math.ceil(load_s / LOAD_STEP_S)
        for step in range(steps):
            progress(step, steps, "load")
            time.sleep(load_s / steps)
        _pretend_vram(model, scratch)
        limits = {"dimensions": self._dimensions, "sample_rate": media.SAMPLE_RATE}
        return Ready(device="cpu", slots=slots, versions={"python": platform.python_version()}, limits=limits)

    def validate(self, kind: str, params: Any) -> None:
        """Refuse what arithmetic cannot serve, rather than ignore it."""
        if isinstance(params, work.LlmParams):
            for name in ("tools", "json_schema", "json_object", "grammar", "logprobs"):
                if getattr(params, name):
                    raise refuse("unsupported", f"The synthetic engine has no {name}.", name)
            _prompt_of(params)
        if isinstance(params, work.TtsParams) and params.format not in ("wav", "pcm"):
            raise refuse("unsupported", "The synthetic engine speaks wav and pcm only.", "format")
        if isinstance(params, work.ImageParams) and params.format != "png":
            raise refuse("unsupported", "The synthetic engine draws png only.", "format")
        if isinstance(params, work.VideoParams) and params.format != "mp4":
            raise refuse("unsupported", "The synthetic engine films mp4 only (with PNG frames).", "format")

    def run(self, job: Job) -> Outcome:
        """Answer from the parameters alone."""
        runs: dict[str, Callable[[Job], Outcome]] = {
            work.Kind.LLM: self._llm,
            work.Kind.EMBEDDING: self._embedding,
            work.Kind.RERANK: self._rerank,
            work.Kind.AUDIO_STT: self._stt,
            work.Kind.AUDIO_TTS: self._tts,
            work.Kind.IMAGE: self._image,
            work.Kind.VIDEO: self._video,
            work.Kind.COMMAND: self._command,
        }
        return runs[job.kind](job)

    def _tick(self, job: Job, n: int, total: int | None, phase: str) -> None:
        """One unit of work: the configured delay, the progress, the cancel."""
        if job.cancelled.wait(self._delay_s) if self._delay_s else job.cancelled.is_set():
            raise CancelledRun
        job.progress(n, total, phase)

    # ---- text

    def _llm(self, job: Job) -> Outcome:
        """Say the prompt back, word by word; with the option `tokens`, round and round until so many."""
        params: work.LlmParams = job.params
        words = re.findall(r"\S+\s*", _prompt_of(params)) or ["nothing "]
        wanted = self._tokens or len(words)
        limit = min(wanted, params.max_tokens or wanted)
        said, reason = "", "length" if limit < wanted else "stop"
        count = 0
        for count in range(1, limit + 1):
            self._tick(job, count, limit, "decode")
            token = words[(count - 1) % len(words)]
            if count % len(words) == 0 and not token[-1].isspace():
                token += " " if count < limit else ""
            cut = _first_stop(said, token, params.stop)
            piece = token if cut is None else token[:cut]
            said += piece
            if piece:
                job.emit(work.LlmChunk(delta=work.Delta(content=piece)))
            if cut is not None:
                reason = "stop"
                break
        job.emit(work.LlmChunk(finish_reason=reason))
        usage: dict[str, float] = {"prompt_tokens": len(words), "completion_tokens": count}
        return Outcome(body=work.LlmResult(content=said, finish_reason=reason), usage=usage)

    def _embedding(self, job: Job) -> Outcome:
        params: work.EmbeddingParams = job.params
        dimensions = params.dimensions or self._dimensions
        rows = []
        for number, item in enumerate(params.input, 1):
            self._tick(job, number, len(params.input), "embed")
            rows.append(_vector(repr(item), dimensions))
        body = work.EmbeddingResult(count=len(rows), dimensions=dimensions, vectors=b"".join(rows))
        tokens = sum(len(item.split()) if isinstance(item, str) else len(item) for item in params.input)
        return Outcome(body=body, usage={"prompt_tokens": tokens})

    def _rerank(self, job: Job) -> Outcome:
        """Score = share of the query's words that the document holds."""
        params: work.RerankParams = job.params
        query = set(params.query.lower().split())
        scores = []
        for number, document in enumerate(params.documents):
            self._tick(job, number + 1, len(params.documents), "rerank")
            shared = query & set(document.lower().split())
            scores.append({"index": float(number), "relevance_score": len(shared) / max(1, len(query))})
        scores.sort(key=lambda row: -row["relevance_score"])
        body = work.RerankResult(results=scores[: params.top_n])
        return Outcome(body=body, usage={"documents": len(scores)})

    def _command(self, job: Job) -> Outcome:
        """Say the arguments back, one line each, and leave them as a file."""
        lines = [f"{name}={value}" for name, value in sorted(job.params.args.items())]
        for number, line in enumerate(lines, 1):
            self._tick(job, number, len(lines), "output")
            job.progress(number, len(lines), "output", line)
        job.save("args.json", "application/json", msgspec.json.encode(job.params.args, order="sorted"))
        return Outcome(body=work.CommandResult(exit_code=0, output_tail=lines))

    # ---- audio

    def _stt(self, job: Job) -> Outcome:
        """One made-up word per started second, chosen by the hash of the file."""
        data = job.inputs["audio"].read_bytes()
        try:
            seconds = media.wav_seconds(data)
        except (wave.Error, EOFError) as error:
            raise refuse(
                "invalid_input_file", f"The synthetic engine hears WAV only: {error}.", "inputs.audio"
            ) from None
        digest = hashlib.sha256(data).hexdigest()
        segments = []
        for number in range(max(1, math.ceil(seconds))):
            self._tick(job, number + 1, None, "segment")
            text = f" {digest[number % 60 : number % 60 + 4]}"
            end = min(seconds, number + 1.0)
            word = work.Word(word=text, start=float(number), end=end, probability=1.0)
            words = [word] if job.params.word_timestamps else []
            segments.append(work.Segment(id=number, start=float(number), end=end, text=text, words=words))
            job.emit(work.SttChunk(segment=segments[-1]))
        body = work.SttResult(
            text="".join(segment.text for segment in segments).strip(),
            language=job.params.language or "en",
            duration=seconds,
            task=job.params.task,
            language_probability=1.0,
            segments=segments,
        )
        return Outcome(body=body, usage={"audio_seconds": seconds})

    def _tts(self, job: Job) -> Outcome:
        """One tone per character, higher for higher code points."""
        params: work.TtsParams = job.params
        text = params.text[:MAX_NOTES]
        self._tick(job, 1, 1, "speak")
        notes = [200.0 + 10 * (ord(character) % 128) for character in text]
        note_s = NOTE_S / params.speed
        if params.format == "wav":
            file = job.save("speech.wav", work.AUDIO_MIME["wav"], media.tone_wav(notes, note_s))
            samples = (file.size - 44) // 2
        else:
            file = job.save("speech.pcm", work.AUDIO_MIME["pcm"], media.tone_pcm(notes, note_s))
            samples = file.size // 2
        duration = samples / media.SAMPLE_RATE
        body = work.AudioResult(sample_rate=media.SAMPLE_RATE, duration=duration, format=params.format)
        return Outcome(body=body, usage={"characters": len(params.text), "audio_seconds": duration})

    # ---- pictures

    def _image(self, job: Job) -> Outcome:
        params: work.ImageParams = job.params
        first = _seed_of(params.prompt, params.seed)
        start = _start_image(job)
        for number in range(params.n):
            self._tick(job, number + 1, params.n, "step")
            colours = _digest(params.prompt, params.negative_prompt, str(first + number), start)
            picture = media.png(params.width, params.height, colours[:3], colours[3:6])
            job.save(f"image-{number}.png", work.IMAGE_MIME["png"], picture)
        body = work.ImageResult(
            width=params.width, height=params.height, format="png", seeds=[first + number for number in range(params.n)]
        )
        return Outcome(body=body, usage={"images": params.n})

    def _video(self, job: Job) -> Outcome:
        params: work.VideoParams = job.params
        seed = _seed_of(params.prompt, params.seed)
        start = _start_image(job)
        frames = []
        for number in range(params.frames):
            self._tick(job, number + 1, params.frames, "encode")
            colours = _digest(params.prompt, params.negative_prompt, str(seed), start, str(number))
            frames.append(media.png(params.width, params.height, colours[:3], colours[3:6]))
        job.save("video.mp4", work.VIDEO_MIME["mp4"], media.mp4(frames, params.width, params.height, params.fps))
        body = work.VideoResult(
            width=params.width,
            height=params.height,
            frames=len(frames),
            fps=params.fps,
            format="mp4",
            codec="png",
            seed=seed,
        )
        return Outcome(body=body, usage={"frames": len(frames)})


# ---- arithmetic


def _pretend_vram(model: Model, scratch: Path) -> None:
    """Say for the simulated GPU reader what this model takes; whole at once, it may be read at any time."""
    gpu = option(model, "gpu", str, "")
    taken = option(model, "vram_bytes", Annotated[int, msgspec.Meta(ge=0)], 0)
    if bool(gpu) != bool(taken):
        raise refuse("load_failed", "The options gpu and vram_bytes go together.", "options.gpu")
    if gpu:
        partial = scratch / f".{VRAM_FILE}"
        partial.write_bytes(msgspec.json.encode({"uuid": gpu, "bytes": taken}))
        partial.replace(scratch / VRAM_FILE)


def _prompt_of(params: work.LlmParams) -> str:
    """The text to say back: the prompt, or the last message. Raises FaultError for parts that are not text."""
    if params.messages is None:
        return params.prompt or ""
    content = params.messages[-1].content
    if isinstance(content, list):
        for part in content:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise refuse("unsupported", "The synthetic engine reads text parts only.", "messages.content")
        return "".join(part["text"] for part in content)
    return content or ""


def _first_stop(said: str, token: str, stops: Sequence[str]) -> int | None:
    """Where in `token` the earliest stop string begins, so that it is not said; None when there is none.

    A stop string that began in earlier tokens cuts the whole token: what was said cannot be taken back.
    """
    whole = said + token
    found = [at for stop in stops if (at := whole.find(stop, max(0, len(said) - len(stop) + 1))) >= 0]
    return max(0, min(found) - len(said)) if found else None


def _digest(*parts: str) -> bytes:
    return hashlib.sha256("\0".join(parts).encode(errors="surrogatepass")).digest()


def _seed_of(prompt: str, seed: int | None) -> int:
    return seed if seed is not None else int.from_bytes(_digest(prompt)[:4], "big")


def _start_image(job: Job) -> str:
    return hashlib.sha256(job.inputs["image"].read_bytes()).hexdigest() if "image" in job.inputs else ""


def _vector(text: str, dimensions: int) -> bytes:
    """A row of length 1 as float32 little-endian, spread by a hash of `text`."""
    raw = hashlib.shake_256(text.encode(errors="surrogatepass")).digest(4 * dimensions)
    values = [number / 2**31 - 1 + 2**-33 for number in struct.unpack(f"<{dimensions}I", raw)]
    length = math.hypot(*values)
    return struct.pack(f"<{dimensions}f", *(value / length for value in values))


# ---- fixture


def _fixture() -> Fixture:
    options = {"dimensions": 8, "slots": 4, "delay_ms": 2.0}
    chat = {"messages": [{"role": "user", "content": "one two three"}]}
    endless = {"prompt": "again " * 2000, "max_tokens": 2000}
    return Fixture(
        model=Model(name="synthetic-fixture", device="cpu", options=options),
        cases=(
            Case(kind="llm", params=chat, stream=True, check=_is("content", "one two three")),
            Case(kind="embedding", params={"input": ["a", "b"]}, check=_is("dimensions", 8)),
            Case(kind="rerank", params={"query": "b", "documents": ["a", "b"]}, check=_check_rerank),
            Case(kind="audio_tts", params={"text": "abc"}, check=_check_speech),
            Case(kind="image", params={"prompt": "x", "width": 64, "height": 64}, check=_starts(b"\x89PNG")),
            Case(kind="video", params={"prompt": "x", "seconds": 0.5, "format": "mp4"}, check=_starts(b"\0\0\0")),
            Case(kind="command", params={"args": {"a": 1}}, check=_is("output_tail", ["a=1"])),
        ),
        endless=Case(kind="llm", params=endless, stream=True, check=lambda _body, _files: ""),
        refused=(
            ("llm", {"prompt": "x", "grammar": 'root ::= "x"'}),
            ("audio_tts", {"text": "x", "format": "mp3"}),
            ("image", {"prompt": "x", "format": "jpeg"}),
            ("video", {"prompt": "x", "format": "webm"}),
        ),
    )


def _is(field: str, wanted: Any) -> Callable[[Any, Sequence[Path]], str]:
    def check(body: Any, files: Sequence[Path]) -> str:
        found = getattr(body, field)
        return "" if found == wanted else f"{field} is {found!r}, not {wanted!r}"

    return check


def _starts(magic: bytes) -> Callable[[Any, Sequence[Path]], str]:
    def check(body: Any, files: Sequence[Path]) -> str:
        return "" if len(files) == 1 and files[0].read_bytes().startswith(magic) else "not the one file expected"

    return check


def _check_rerank(body: work.RerankResult, files: Sequence[Path]) -> str:
    order = [int(row["index"]) for row in body.results]
    return "" if order == [1, 0] else f"ranked as {order}"


def _check_speech(body: work.AudioResult, files: Sequence[Path]) -> str:
    seconds = media.wav_seconds(files[0].read_bytes())
    return "" if abs(seconds - 3 * NOTE_S) < 1e-3 and abs(seconds - body.duration) < 1e-3 else f"{seconds} s long"


ENGINE = SyntheticEngine
