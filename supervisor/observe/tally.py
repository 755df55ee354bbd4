"""What other parts call when something happens that is worth a number; names and labels are in `metrics_table`.

No call blocks, fails or decides anything: counting is never a reason for a job to end.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from protocol.faults import CODES
from protocol.work import Kind
from supervisor.observe.registry import OTHER, Registry

# Keys of a result's usage -> where they are counted.
_USAGE: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "prompt_tokens": ("tokens_total", {"direction": "input"}),
    "completion_tokens": ("tokens_total", {"direction": "output"}),
    "cached_tokens": ("tokens_total", {"direction": "cached"}),
    "audio_seconds": ("audio_seconds_total", {}),
    "images": ("images_total", {}),
    "frames": ("frames_total", {}),
    "characters": ("characters_total", {}),
    "documents": ("documents_total", {}),
}


class Tally:
    """The numbers of this supervisor.

    Args:
        models, engines: configured names; they stand for themselves however many others come.
        places: name -> folder whose disk is watched.
        cache_bytes: how much pulled models hold; None when it is not known.
        log_lines, log_dropped: counts of the log, by level and by sink.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        *,
        models: Iterable[str] = (),
        engines: Iterable[str] = (),
        places: Mapping[str, Path] | None = None,
        cache_bytes: Callable[[], int | None] = lambda: None,
        log_lines: Callable[[], Mapping[str, int]] = dict,
        log_dropped: Callable[[], Mapping[str, int]] = dict,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        known = {"model": list(models), "engine": list(engines), "kind": [str(kind) for kind in Kind], "code": [*CODES]}
        self.registry = Registry(known=known)
        self._places = dict(places or {})
        self._cache_bytes, self._log_lines, self._log_dropped = cache_bytes, log_lines, log_dropped
        self._clock = clock
        self._sessions = 0
        self._heard: float | None = None
        self._self = psutil.Process()

    def joined(self, model: str, engine: str) -> None:
        """A model is served that was not at the start."""
        self.registry.know("model", model)
        self.registry.know("engine", engine)

    # ---- link

    def declined(self, code: str) -> None:
        """An offer was declined."""
        self.registry.add("declines_total", code=_code(code))

    def session_opened(self) -> None:
        """The coordinator welcomed this worker."""
        self._sessions += 1
        self.registry.add("reconnects_total", 1.0 if self._sessions > 1 else 0.0)
        self.heard()

    def heard(self) -> None:
        """Something came from the coordinator."""
        self._heard = self._clock()

    def transferred(self, direction: str, count: int) -> None:
        """Bytes of a job's files moved; `direction` is "in" or "out"."""
        self.registry.add("transfer_bytes_total", count, direction=direction)

    # ---- jobs

    def phase(self, kind: str, phase: str, seconds: float) -> None:
        """A phase of an attempt is over."""
        self.registry.observe("job_duration_seconds", seconds, kind=kind, phase=phase)

    def first_output(self, kind: str, model: str, seconds: float) -> None:
        """The first chunk of an attempt came this long after the claim."""
        self.registry.observe("time_to_first_token_seconds", seconds, kind=kind, model=model)

    def ended(self, kind: str, model: str, outcome: str, code: str = "") -> None:
        """An attempt ended: "succeeded", "failed" or "cancelled"; a fault has its code."""
        self.registry.add("jobs_total", kind=kind, model=model, outcome=outcome)
        if code:
            self.registry.add("job_faults_total", kind=kind, model=model, code=_code(code))

    def used(self, model: str, usage: Mapping[str, float]) -> None:
        """What an attempt used, as its result says."""
        for name, amount in usage.items():
            if name in _USAGE:
                family, labels = _USAGE[name]
                self.registry.add(family, amount, model=model, **labels)

    def token_pace(self, model: str, seconds: float) -> None:
        """Time between two tokens of an attempt, on average."""
        self.registry.observe("time_per_output_token_seconds", seconds, model=model)

    # ---- host

    def loaded(self, engine: str, seconds: float) -> None:
        """An instance got ready this long after it was started."""
        self.registry.observe("engine_load_seconds", seconds, engine=engine)

    def escalated(self, engine: str, signal: str) -> None:
        """An instance had to be ended by SIGTERM, SIGKILL, or could not be ended at all ("unkillable")."""
        self.registry.add("kill_escalations_total", engine=engine, signal=signal)

    def paced(self, model: str, share: float) -> None:
        """The latest runs of a model went at this share of its usual speed."""
        self.registry.set("model_pace_ratio", round(share, 4), model=model)

    def spilled(self, model: str, count: int) -> None:
        """So many bytes of a model lie in RAM and belong on the GPU."""
        self.registry.set("model_spilled_bytes", count, model=model)

    # ---- the rest

    def reloaded(self, outcome: str) -> None:
        """worker.toml was read again: "applied" or "refused"."""
        self.registry.add("config_reloads_total", outcome=outcome)

    def lines(self) -> list[str]:
        """Everything, with what is only read when somebody asks."""
        put = self.registry.set
        put("heartbeat_age_seconds", None if self._heard is None else self._clock() - self._heard)
        for place, folder in self._places.items():
            try:
                disk = shutil.disk_usage(folder)
            except OSError:  # gone, or not mounted: not known
                put("disk_free_bytes", None, place=place)
                put("disk_size_bytes", None, place=place)
                continue
            put("disk_free_bytes", disk.free, place=place)
            put("disk_size_bytes", disk.total, place=place)
        put("model_cache_bytes", self._cache_bytes())
        for level, count in self._log_lines().items():
            self.registry.raise_to("log_lines_total", count, level=level)
        for sink, count in self._log_dropped().items():
            self.registry.raise_to("log_dropped_total", count, sink=sink)
        with self._self.oneshot():
            put("rss_bytes", self._self.memory_info().rss)
            times = self._self.cpu_times()
            self.registry.raise_to("cpu_seconds_total", round(times.user + times.system, 3))
            put("start_time_seconds", self._self.create_time())
        return self.registry.lines()


def _code(code: str) -> str:
    """Engines make up codes; each of theirs would be a time series."""
    return code if code in CODES else OTHER
