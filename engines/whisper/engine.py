"""Speech to text on faster-whisper (CTranslate2).

files.model        folder of a CTranslate2 Whisper model, tokenizer.json included
options:
  compute_type     "default" keeps the stored type where the device can: int8, int8_float16, float16, float32, …
  threads          CPU threads of a run; 0 means up to 4, as there are cores
  slots            native workers: runs that really go on side by side, each with its own memory
  max_audio_s      longest audio taken, in seconds
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec

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
from engines.whisper import folder
from protocol.work import Segment, SttChunk, SttParams, SttResult, Word

# Peak memory at this length: 3.1 GB besides the model, measured. Longer recordings are better cut first.
MAX_AUDIO_S = 4 * 3600.0
_FIXTURE = Path(__file__).parent / "fixture"
_OPTIONS = ("compute_type", "threads", "slots", "max_audio_s")
_MOST_THREADS = 4  # of a run when not told; Whisper's decoder gains nothing from more
_READ_REPORT_S = 60.0  # decoding reports once per so many seconds of audio

_Slots = Annotated[int, msgspec.Meta(ge=1, le=64)]
_Length = Annotated[float, msgspec.Meta(gt=0, le=24 * 3600)]


class Whisper(Engine):
    """One Whisper model. Runs share the weights; each has its own pass (see passes.py)."""

    name = "whisper"
    kinds = ("audio_stt",)
    licence = "MIT"

    def __init__(self) -> None:
        self._model: Any = None
        self._vocabulary = 0
        self._control = range(0)
        self._max_audio_s = MAX_AUDIO_S

    @classmethod
    def probe(cls, backend: str) -> Claims:
        """Import the libraries and ask CTranslate2 for its devices."""
        import ctranslate2  # type: ignore[import-untyped]

        devices, notes = ["cpu"], []
        if found := ctranslate2.get_cuda_device_count():
            types = ", ".join(sorted(ctranslate2.get_supported_compute_types("cuda")))
            devices.append("cuda")
            notes.append(f"{found} CUDA device(s), compute types {types}")
        return Claims(versions=_versions(), devices=tuple(devices), notes=tuple(notes))

    @classmethod
    def fixture(cls, backend: str) -> Fixture:
        """A model of 0.5 M parameters that hears spoken digits and the tone alphabet of piper's fixture voices."""
        model = Model(
            name="whisper-tiny-test",
            files={"model": str(_FIXTURE / "whisper-tiny-test")},
            options={"threads": 1, "slots": 2},
        )
        return Fixture(
            model=model,
            cases=(
                _case("digits.flac", "three one four", word_timestamps=True),
                _case("hello-tones.flac", "hello world", stream=True),
            ),
            endless=_case("silence-10min.flac", "", chunk_length_s=1),
            refused=(
                ("audio_stt", {"prompt": [999_999]}),
                ("audio_stt", {"task": "translate"}),
                ("audio_stt", {"language": "de"}),
            ),
        )

    def load(self, model: Model, scratch: Path, progress: LoadProgress) -> Ready:
        """Load the folder and encode one silent window, so that a broken GPU library shows now."""
        known_options(model, _OPTIONS)
        self._max_audio_s = option(model, "max_audio_s", _Length, MAX_AUDIO_S)
        place = folder.check(main_file(model))
        asked = option(model, "compute_type", str, "default")
        self._model = _open(model, place, asked)
        progress(1, 2, "load")
        self._vocabulary = folder.vocabulary_size(place)
        self._control = folder.check_tokenizer(self._model.hf_tokenizer, self._vocabulary)
        _warm_up(self._model, model.device)
        progress(2, 2, "load")
        native = self._model.model
        return Ready(
            device=f"cuda:{native.device_index[0]}" if native.device == "cuda" else native.device,
            compute_type=native.compute_type,
            slots=native.num_workers,
            versions=_versions(),
            limits={
                "multilingual": native.is_multilingual,
                "vocabulary": self._vocabulary,
                "max_audio_s": self._max_audio_s,
                "compute_type_asked": asked,
            },
        )

    def validate(self, kind: str, params: SttParams) -> None:
        """Refuse what this model cannot do, and token ids that would crash the native code."""
        multilingual = self._model.model.is_multilingual
        if params.task == "translate" and not multilingual:
            raise refuse("invalid_parameter", "task: This model is English-only, it cannot translate.", "task")
        if params.language is not None and not self._speaks(params.language):
            known = "is English-only" if not multilingual else f"does not know {params.language!r}"
            raise refuse("invalid_parameter", f"language: This model {known}.", "language")
        if isinstance(params.prompt, list):
            self._check_tokens(params.prompt)

    def run(self, job: Job) -> Outcome:
        """Decode the file, then transcribe window by window.

        Cancellation is seen while decoding and before every native call, not within one.
        """
        from engines.whisper import audio
        from engines.whisper.passes import Pass

        if "audio" not in job.inputs:
            raise refuse("invalid_input_file", "audio: the input file is missing.", "audio")
        clock = _Clock(job)
        rate = self._model.feature_extractor.sampling_rate
        samples = audio.decode(job.inputs["audio"], rate, self._max_audio_s, clock.read)
        duration = len(samples) / rate
        one = Pass(self._model, clock.heard)
        found, info = one.transcribe(samples, **_arguments(job.params))
        del samples  # the spectrogram is made
        one.begin()
        clock.total_s = info.duration_after_vad
        segments = list(_emitted(job, found))
        clock.heard(clock.total_s)
        result = SttResult(
            text="".join(segment.text for segment in segments).strip(),
            language=info.language,
            language_probability=float(info.language_probability),
            duration=duration,
            task=job.params.task,
            segments=segments,
        )
        return Outcome(body=result, usage={"audio_seconds": duration})

    def _check_tokens(self, tokens: list[int]) -> None:
        """CTranslate2 looks ids up without a check: one beyond the table ends the process with SIGSEGV."""
        for token in tokens:
            what = ""
            if token >= self._vocabulary:
                what = f"token id {token} is not below {self._vocabulary}, the size of this model's vocabulary"
            elif token in self._control:
                what = f"token id {token} is a control token, only text and timestamps may precede the audio"
            if what:
                raise refuse("invalid_parameter", f"prompt: {what}.", "prompt")

    def _speaks(self, language: str) -> bool:
        if not self._model.model.is_multilingual:
            return language == "en"
        token = self._model.hf_tokenizer.token_to_id(f"<|{language}|>")
        return token is not None and language in self._model.supported_languages


class _Clock:
    """Turns seconds of audio into progress and looks for a cancel; `total_s` is set when it is known.

    The counter is in hundredths of a second and grows with every call: the fallback temperatures of one hard
    window are work too.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._n = 0
        self._read_s = 0.0
        self.total_s: float | None = None

    def read(self, seconds: float) -> None:
        """So much is decoded. Raises CancelledRun."""
        self._job.check_cancelled()
        if seconds >= self._read_s + _READ_REPORT_S:
            self._read_s = seconds
            self._job.progress(int(seconds), phase="read")

    def heard(self, seconds: float) -> None:
        """So much is transcribed. Raises CancelledRun."""
        self._job.check_cancelled()
        self._n = max(self._n + 1, round(seconds * 100))
        total = None if self.total_s is None else max(self._n, math.ceil(self.total_s * 100))
        self._job.progress(self._n, total, phase="window")


def _arguments(params: SttParams) -> dict[str, Any]:
    """Temperature 0 keeps the library's ladder of fallback temperatures, as OpenAI's API describes it."""
    return {
        "language": params.language,
        "task": params.task,
        "beam_size": params.beam_size,
        "initial_prompt": params.prompt or None,
        "word_timestamps": params.word_timestamps,
        "vad_filter": params.vad,
        "chunk_length": params.chunk_length_s,
        **({"temperature": params.temperature} if params.temperature else {}),
    }


def _emitted(job: Job, found: Any) -> Iterator[Segment]:
    for number, segment in enumerate(found):
        ours = _segment(number, segment)
        job.emit(SttChunk(segment=ours))
        yield ours


def _segment(number: int, segment: Any) -> Segment:
    """The library's numbers are numpy.float64, which msgspec cannot encode."""
    return Segment(
        id=number,
        start=float(segment.start),
        end=float(segment.end),
        text=segment.text,
        tokens=[int(token) for token in segment.tokens],
        temperature=float(segment.temperature),
        avg_logprob=float(segment.avg_logprob),
        compression_ratio=float(segment.compression_ratio),
        no_speech_prob=float(segment.no_speech_prob),
        seek=int(segment.seek),
        words=[
            Word(word=word.word, start=float(word.start), end=float(word.end), probability=float(word.probability))
            for word in segment.words or ()
        ],
    )


def _open(model: Model, place: Path, compute_type: str) -> Any:
    device = _device(model.device)
    if device == "cuda":
        folder.preload_cublas()
    from faster_whisper import WhisperModel  # type: ignore[import-untyped]

    slots = option(model, "slots", _Slots, 1)
    given = {
        "device": device,
        "compute_type": compute_type,
        # The library would take 4 on any machine.
        "cpu_threads": threads_of(model, at_once=slots, most=_MOST_THREADS),
        "num_workers": slots,
    }
    try:
        return WhisperModel(str(place), local_files_only=True, **given)
    except Exception as error:  # tokenizers raises bare Exception
        text = str(error)
        field = "options.compute_type" if "compute type" in text else "device" if "CUDA" in text else "files.model"
        raise refuse("load_failed", f"faster-whisper cannot load {place} on {device}: {text}", field) from None


def _device(asked: str) -> str:
    """Resolve "auto" ourselves: the library's own "auto" does not say what it chose until it is loaded."""
    import ctranslate2

    if asked == "auto":
        return "cuda" if ctranslate2.get_cuda_device_count() else "cpu"
    return asked


def _warm_up(model: Any, device: str) -> None:
    """Encode one silent window: a missing cuBLAS raises only at the first encode, long after the load."""
    import numpy as np

    extractor = model.feature_extractor
    if extractor.mel_filters.shape[0] != model.model.n_mels:
        what = f"{model.model.n_mels} mels, but its preprocessor_config.json says {extractor.mel_filters.shape[0]}"
        raise refuse("load_failed", f"The model was made for {what}.", "files.model")
    try:
        model.encode(np.zeros((model.model.n_mels, 3000), np.float32))
    except Exception as error:
        hint = "Install nvidia-cublas-cu12 into this engine's interpreter, or run `supervisor setup`."
        raise refuse(
            "load_failed",
            f"The model is loaded but cannot compute on {device}: {error}",
            "device",
            **({"hint": hint} if "cublas" in str(error).lower() else {}),
        ) from None


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("faster-whisper", "ctranslate2", "av")}


def _case(clip: str, text: str, *, stream: bool = False, **params: Any) -> Case:
    def check(result: SttResult, _files: Any) -> str:
        return "" if result.text == text else f"heard {result.text!r} where {text!r} is said"

    return Case(
        kind="audio_stt",
        params={"language": "en", **params},
        inputs={"audio": str(_FIXTURE / clip)},
        check=check,
        stream=stream,
    )


ENGINE = Whisper
