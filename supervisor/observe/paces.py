"""How fast each model runs here, kept over restarts, so that a collapse is noticed, told once, and shown.

`intake/pace.py` judges; this remembers. A rate is work done a second of an attempt's run, in the unit of its task
kind. Only runs that say something count (`rate_of`): a chat that answers one word to a long prompt is slow for a good
reason. Images and videos have no rate: their usage does not tell their size and steps.
"""

from __future__ import annotations

import hashlib
import logging
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from supervisor.host.work import ModelSpec
from supervisor.intake.pace import Pace, collapse_sentence
from supervisor.state import write_atomically

log = logging.getLogger(__name__)

# Models with their configurations and devices that are remembered; the one that ran longest ago goes first.
MOST = 200
# Rates are written down at most this often: after a crash the last minute is measured again.
SAVE_EVERY_S = 60.0
# Below this, starting and stopping the run is most of what is measured.
LEAST_S = 0.1
# Task kind -> what of the usage is its work, and how much of it a run needs to say something.
_WORK: Mapping[str, tuple[str, float]] = {
    "llm": ("completion_tokens", 32),
    "embedding": ("prompt_tokens", 512),
    "audio_stt": ("audio_seconds", 10),
    "audio_tts": ("audio_seconds", 2),
}
# A prompt is read many times faster than an answer is written; up to this many tokens of it for each of the answer
# the reading does not matter against a collapse to a quarter.
_PROMPT_TOKENS = 16


def rate_of(kind: str, usage: Mapping[str, float], seconds: float) -> float:
    """Work a second; 0 when the run says nothing about the model's speed.

    Args:
        seconds: from the engine's `started` to its result.
    """
    unit, least = _WORK.get(kind, ("", 0))
    work = usage.get(unit, 0)
    if not unit or work < least or seconds < LEAST_S:
        return 0.0
    if kind == "llm" and usage.get("prompt_tokens", 0) - usage.get("cached_tokens", 0) > _PROMPT_TOKENS * work:
        return 0.0
    return work / seconds


def identity_of(spec: ModelSpec, device: str) -> str:
    """What a pace belongs to: this model, set up like this, on this device; another one, another pace."""
    plain = [spec.name, spec.engine.name, spec.engine.module, spec.model, device]
    return hashlib.sha256(msgspec.msgpack.encode(plain, order="deterministic")).hexdigest()[:32]


class Paces:
    """The pace of every model. A file that is lost or broken costs only history.

    Args:
        path: a small JSON file in the state folder.
        identity: model -> what its pace belongs to now (`identity_of`); "" when that is not known.
        on_pace: told a model and its speed as a share of its usual one, when the usual one is known.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        path: Path,
        identity: Callable[[str], str],
        *,
        on_pace: Callable[[str, float], None] = lambda _model, _share: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path, self._identity, self._on_pace, self._clock = path, identity, on_pace, clock
        self._paces: dict[str, Pace] = {}
        self._keys: dict[str, str] = {}  # model -> the identity it ran under last
        self._saved_at, self._unsaved, self._told = clock(), False, False
        try:
            self._paces = msgspec.json.decode(path.read_bytes(), type=dict[str, Pace])
        except FileNotFoundError:
            pass  # the first life
        except (OSError, msgspec.MsgspecError) as error:
            log.warning("how fast models ran earlier is lost: %s: %s", path, error)

    def seen(self, model: str, rate: float) -> None:
        """A run of this model went at this rate. Writes at most every `SAVE_EVERY_S`, and when a verdict changes."""
        key = self._identity(model)
        if not key or rate <= 0:
            return
        old = self._paces.pop(key, Pace())
        new = self._paces[key] = old.seen(rate)
        self._keys[model] = key
        for oldest in list(self._paces)[:-MOST]:
            del self._paces[oldest]
        self._unsaved = True
        if new.collapsed and not old.collapsed:
            log.warning("%s", collapse_sentence(model, new))
        elif old.collapsed and not new.collapsed:
            log.info("%s runs as fast as it used to again", model)
        if new.usual:
            self._on_pace(model, statistics.median(new.last) / new.usual)
        if bool(new.collapsed) != bool(old.collapsed) or self._clock() - self._saved_at >= SAVE_EVERY_S:
            self.save()

    def sentence(self, model: str) -> str:
        """Why this model is slow; "" when it is not, or when it has not run in this life."""
        return collapse_sentence(model, self._paces.get(self._keys.get(model, ""), Pace()))

    def save(self) -> None:
        """Write down what is not written yet; also for the end of the supervisor. A full disk costs a line."""
        if not self._unsaved:
            return
        self._saved_at, self._unsaved = self._clock(), False
        try:
            write_atomically(self._path, msgspec.json.encode(self._paces))
            self._told = False
        except OSError as error:
            if not self._told:
                log.warning("how fast models run cannot be kept: %s: %s", self._path, error.strerror)
            self._told = True
