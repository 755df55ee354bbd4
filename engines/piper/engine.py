"""Text to speech on piper-tts, which is GPL-3.0-or-later and runs in this process alone.

files.model        VOICE.onnx
files.config       VOICE.onnx.json; the file beside the model when not named
options:
  voices           names of your own for callers: {"alloy" = "default", "echo" = "a speaker"}
  slots            runs at once
  threads          CPU threads, shared by the slots
  espeak_data      folder of espeak-ng data; the one inside piper-tts when not named
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from engines.piper import phonemes, voices
from engines.runtime import ort
from engines.runtime.contract import (
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
    main_file,
    option,
    refuse,
)
from engines.runtime.threads import threads_of
from protocol.work import AUDIO_MIME, AudioResult, TtsChunk, TtsParams

_FIXTURE = Path(__file__).parent / "fixture"
_OPTIONS = ("voices", "slots", "threads", "espeak_data")
_CHUNK_BYTES = 64 * 2**10
_Slots = Annotated[int, msgspec.Meta(ge=1, le=64)]


class Piper(Engine):
    """One voice model, which may hold many speakers."""

    name = "piper"
    kinds = ("audio_tts",)
    licence = "GPL-3.0-or-later (piper-tts and the espeak-ng inside it)"

    def __init__(self) -> None:
        self._voice: Any = None
        self._names = voices.Names()
        self._running: dict[Job, ort.Terminator] = {}

    @classmethod
    def probe(cls, backend: str) -> Claims:
        """Import the libraries; CUDA is claimed when onnxruntime was built with it, which proves little."""
        import piper
        import soundfile  # type: ignore[import-untyped]

        notes = (f"libsndfile {soundfile.__libsndfile_version__}", f"espeak-ng data in {Path(piper.__file__).parent}")
        return Claims(versions=_versions(), devices=ort.claimed_devices(), notes=notes)

    @classmethod
    def fixture(cls, backend: str) -> Fixture:
        """A voice that gives each character a tone of its own: the audio can be decoded back to its text."""
        long = "the engine speaks this sentence again and again. " * 1000
        return Fixture(
            model=Model(
                name="tone-text",
                files={"model": str(_FIXTURE / "tone-text.onnx")},
                options={"threads": 1, "slots": 2},
            ),
            cases=(
                tone_case("hello world", "tone-text"),
                tone_case("job 42 done.", "tone-text", format="flac", speed=2.0, voice="tone-text"),
                tone_case("it's 10-4, over!", "tone-text", format="ogg", speed=0.5),
            ),
            endless=tone_case(long.strip(), "tone-text"),
            refused=(
                ("audio_tts", {"text": "\N{GRINNING FACE} !?"}),
                ("audio_tts", {"text": "a\0b"}),
                ("audio_tts", {"text": "hello", "voice": "nobody"}),
                ("audio_tts", {"text": "hello", "language": "de"}),
            ),
        )

    def load(self, model: Model, scratch: Path, progress: LoadProgress) -> Ready:
        """Load the voice and speak one sound, so that a broken model or espeak-ng shows now."""
        known_options(model, _OPTIONS)
        slots = option(model, "slots", _Slots, 1)
        aliases = option(model, "voices", dict[str, str | int], {})
        self._voice = voices.open_voice(model, main_file(model), threads_of(model))
        progress(1, 2, "load")
        self._names = voices.names(self._voice, model, aliases)
        _warm_up(self._voice)
        progress(2, 2, "load")
        return Ready(
            device=self._voice.session.device,
            slots=slots,
            compute_type="float32",
            versions=_versions(),
            limits={
                "sample_rate": self._voice.config.sample_rate,
                "voices": list(self._names.known),
                "language": self._names.language,
            },
        )

    def validate(self, kind: str, params: TtsParams) -> None:
        """Refuse a text without a sound, a voice that is not there, a language it does not speak."""
        self._names.speaker(params.voice)
        self._names.check_language(params.language)
        phonemes.check_text(params.text)
        phonemes.pieces(self._voice, params.text)

    def run(self, job: Job) -> Outcome:
        """Speak piece by piece (a sentence, or part of an over-long one) into one file.

        Cancellation is seen between pieces, and stops onnxruntime within one.
        """
        from engines.piper.output import Output

        params: TtsParams = job.params
        speaker = self._names.speaker(params.voice)
        work = phonemes.pieces(self._voice, params.text)
        name = f"speech.{params.format}"
        stop = self._running[job] = ort.Terminator()
        try:
            with Output(job.folder / name, params.format, self._voice.config.sample_rate) as output:
                for number, piece in enumerate(work):
                    job.check_cancelled()
                    output.write(voices.speak(self._voice, piece, speaker, params.speed, stop))
                    if job.stream and output.streams:
                        _tell(job, output.fresh())
                    job.progress(number + 1, len(work), phase="sentence")
        finally:
            del self._running[job]
        job.adopt(name, AUDIO_MIME[params.format])
        result = AudioResult(sample_rate=output.rate, duration=output.seconds, format=params.format)
        return Outcome(body=result, usage={"characters": len(params.text), "audio_seconds": output.seconds})

    def cancel(self, job: Job) -> None:
        """Stop the piece that is being computed; onnxruntime looks between the nodes of its graph."""
        if stop := self._running.get(job):
            stop.terminate()


def _tell(job: Job, data: bytes) -> None:
    for at in range(0, len(data), _CHUNK_BYTES):
        job.emit(TtsChunk(audio=data[at : at + _CHUNK_BYTES]))


def tone_case(text: str, model: str, expected: str | None = None, **params: Any) -> Case:
    """A case for a fixture voice: the audio must decode back to `expected` (the text itself when None)."""

    def check(result: AudioResult, files: Sequence[Path]) -> str:
        from engines.piper import tones

        heard = tones.decode_file(files[0], _FIXTURE / f"{model}.onnx.json")
        wanted = text if expected is None else expected
        return "" if heard == wanted else f"the audio says {heard[:200]!r} where {wanted[:200]!r} was asked"

    return Case(kind="audio_tts", params={"text": text, **params}, check=check)


def _warm_up(voice: Any) -> None:
    try:
        sentences = voice.phonemize("a") or [[]]
        ids = voice.phonemes_to_ids(sentences[0])
        voices.speak(voice, ids, voice.config.default_speaker_id, 1.0)
    except Exception as error:
        raise refuse("load_failed", f"The voice is loaded but cannot speak: {error}", "files.model") from None


def _versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in ("piper-tts", "soundfile")}
    return found | {"onnxruntime": ort.version()}


ENGINE = Piper
