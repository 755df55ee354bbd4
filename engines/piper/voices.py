"""Open a piper voice, know its names, run it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from engines.runtime import ort
from engines.runtime.contract import Model, main_file, option
from protocol.faults import refuse

# Other phoneme types fetch their dictionaries from the network, or need packages that are not ours to install.
_PHONEMES = ("espeak", "text")

# espeak-ng ends the process with exit(1) when it cannot read these, and with SIGSEGV when they are empty.
_ESPEAK_FILES = ("phontab", "phondata", "phonindex", "intonations")
_SHOWN = 30


class Names(msgspec.Struct, frozen=True, kw_only=True):
    """Names by which callers may ask for a speaker, and the language of the voice.

    Attributes:
        known: name -> speaker id.
        language: "en_US" or "en", as the voice's config says; "" when it does not.
    """

    known: dict[str, int] = {}
    language: str = ""

    def speaker(self, name: str) -> int:
        """Return the speaker's id. Raises FaultError naming the known voices."""
        if name not in self.known:
            shown = ", ".join(list(self.known)[:_SHOWN])
            more = f" and {len(self.known) - _SHOWN} more" if len(self.known) > _SHOWN else ""
            what = f"voice: This model has no voice {name!r}; known: {shown}{more}."
            raise refuse("invalid_parameter", what, "voice")
        return self.known[name]

    def check_language(self, language: str | None) -> None:
        """Raises FaultError when the voice speaks another language; regions are not compared."""
        if language is not None and self.language and _family(language) != _family(self.language):
            what = f"language: This voice speaks {self.language}, not {language!r}."
            raise refuse("invalid_parameter", what, "language")


def _family(language: str) -> str:
    return language.replace("_", "-").split("-")[0].lower()


def names(voice: Any, model: Model, aliases: Mapping[str, str | int]) -> Names:
    """Collect the names of a voice: its own, its speakers', their ids, and the operator's.

    Raises:
        FaultError: `load_failed`, when an alias means nothing.
    """
    config, first = voice.config, voice.config.default_speaker_id
    known = dict.fromkeys(("default", model.name, main_file(model).stem), first)
    if config.num_speakers > 1:
        known |= {str(number): number for number in range(config.num_speakers)}
        known |= config.speaker_id_map
    for alias, meant in aliases.items():
        if str(meant) not in known:
            raise refuse("load_failed", f"options.voices: there is no voice {meant!r}.", "options.voices")
        known[alias] = known[str(meant)]
    return Names(known=known, language=_language(model, config))


def _language(model: Model, config: Any) -> str:
    told = json.loads(config_path(model).read_bytes()).get("language")
    code = told.get("code") if isinstance(told, dict) else None
    return str(code or config.espeak_voice or "")


def config_path(model: Model) -> Path:
    """Where the voice's config lies. Raises FaultError when it is not there."""
    if "config" in model.files:
        return main_file(model, "config")
    path = Path(f"{main_file(model)}.json")
    if not path.is_file():
        raise refuse("load_failed", f"{path} does not exist; name it with the role `config`.", "files.config")
    return path


def open_voice(model: Model, path: Path, threads: int) -> Any:
    """Load the config, the model and check for espeak-ng's data.

    PiperVoice.load does the same with less choice: its session takes all cores and falls to the CPU without a word,
    and a missing espeak-ng folder ends the process at the first request.

    Returns:
        A PiperVoice whose `session` is an `ort.Session`: its own `synthesize` does not work, `speak` does.

    Raises:
        FaultError: `load_failed`, naming the file.
    """
    from piper import PiperVoice
    from piper.config import PiperConfig
    from piper.phonemize_espeak import ESPEAK_DATA_DIR

    beside = config_path(model)
    try:
        config = PiperConfig.from_dict(json.loads(beside.read_bytes()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{beside} is not the config of a piper voice ({type(error).__name__}: {error})."
        raise refuse("load_failed", what, "files.config") from None
    _check_config(config, beside)
    data = Path(option(model, "espeak_data", str, str(ESPEAK_DATA_DIR)))
    if config.phoneme_type == "espeak":
        _check_espeak(data)
    session = ort.open_session(path, model.device, threads=threads)
    return PiperVoice(config=config, session=session, espeak_data_dir=data)


def _check_config(config: Any, path: Path) -> None:
    if config.phoneme_type not in _PHONEMES:
        what = f"{path}: phonemes of the type {config.phoneme_type.value!r} are not supported, only espeak and text."
        raise refuse("load_failed", what, "files.config")
    for mark in "^_$":
        if mark not in config.phoneme_id_map:
            raise refuse("load_failed", f"{path}: phoneme_id_map has no {mark!r}.", "files.config")


def _check_espeak(data: Path) -> None:
    for name in _ESPEAK_FILES:
        file = data / name
        if not file.is_file() or not file.stat().st_size:
            what = f"The espeak-ng data is incomplete: {file} is missing or empty."
            hint = "Reinstall piper-tts, or point options.espeak_data at a folder of espeak-ng 1.52 data."
            raise refuse("load_failed", what, "options.espeak_data", hint=hint)


def speak(voice: Any, ids: list[int], speaker: int, speed: float, stop: ort.Terminator | None = None) -> Any:
    """Compute one piece: float32 samples, loudest at 1.0, as PiperVoice.synthesize gives them.

    Raises:
        CancelledRun: `stop` was used.
        FaultError: `out_of_memory`, or `engine_failed`.
    """
    import numpy as np

    config = voice.config
    feed = {
        "input": np.array([ids], np.int64),
        "input_lengths": np.array([len(ids)], np.int64),
        "scales": np.array([config.noise_scale, config.length_scale / speed, config.noise_w_scale], np.float32),
    }
    if config.num_speakers > 1:
        feed["sid"] = np.array([speaker], np.int64)
    samples = voice.session.run(None, feed, stop)[0].reshape(-1)
    loudest = float(np.abs(samples).max(initial=0.0))
    return samples / loudest if loudest > 1e-8 else np.zeros_like(samples)
