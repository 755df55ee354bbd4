"""An engine that really does what must never happen, so that the supervisor can be tested against it.

The prompt of an llm run chooses, as "word" or "word:argument" (see `MISDEEDS`); so do the load option `load`
(`AT_LOAD`) and, before the greeting, the environment variable MISBEHAVE_START (`AT_START`). Anything else is answered
with an echo. Both of the latter are done only while the file named by the load option `switch` (for the start: by
MISBEHAVE_SWITCH) says "on", when one is named: so the same model can fail and then recover.
Like the synthetic engine it loads only models named synthetic. `supervisor selftest` runs all of it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from engines.runtime.contract import (
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
from engines.synthetic import misdeeds_attack, misdeeds_box, misdeeds_life, misdeeds_wire
from engines.synthetic.engine import SyntheticEngine, require_synthetic
from engines.synthetic.misdeeds_box import grow
from engines.synthetic.misdeeds_life import LONGEST_S, TICK_S, crash
from protocol import work

# What a run can do wrong: word -> (job, argument) -> what it says if it ever comes back.
MISDEEDS: dict[str, Callable[[Job, str], str]] = (
    misdeeds_life.MISDEEDS | misdeeds_wire.MISDEEDS | misdeeds_box.MISDEEDS | misdeeds_attack.MISDEEDS
)


# ---- before the greeting


def _noise(argument: str) -> None:
    sys.stdout.write("printed at import\n")
    os.write(1, b"written to descriptor 1 at import\n")


AT_START: dict[str, Callable[[str], object]] = {
    "hang": lambda argument: time.sleep(float(argument or LONGEST_S)),
    "exit": lambda argument: os._exit(int(argument or 1)),
    "crash": lambda argument: crash(argument or "SIGSEGV"),
    "noise": _noise,
}


def _is_on(switch: str) -> bool:
    try:
        return not switch or Path(switch).read_text().strip() == "on"
    except OSError:
        return True


def _start() -> None:
    """Misdeeds before the greeting; runs when the module is imported."""
    word, _, argument = os.environ.get("MISBEHAVE_START", "").partition(":")
    if word and _is_on(os.environ.get("MISBEHAVE_SWITCH", "")):
        AT_START[word](argument)


# ---- at the load


def _slow(argument: str, progress: LoadProgress) -> None:
    until = time.monotonic() + float(argument)
    for step in range(1, 10**9):
        if time.monotonic() >= until:
            break
        progress(step, None, "load")
        time.sleep(TICK_S)


def _fault(argument: str, progress: LoadProgress) -> None:
    raise refuse("model_corrupt", "The model is broken, as asked.", "files.model")


def _raise(argument: str, progress: LoadProgress) -> None:
    raise RuntimeError("load raised, as asked")


def _memory(argument: str, progress: LoadProgress) -> None:
    _held.extend(grow(int(argument)))


_held: list[bytearray] = []

AT_LOAD: dict[str, Callable[[str, LoadProgress], object]] = {
    "slow": _slow,
    "stall": lambda argument, progress: time.sleep(LONGEST_S),
    "fault": _fault,
    "raise": _raise,
    "crash": lambda argument, progress: crash(argument or "SIGSEGV"),
    "exit": lambda argument, progress: os._exit(int(argument or 1)),
    "memory": _memory,
}


class Misbehave(Engine):
    """Load options: load ("slow:S", "stall", "fault", "raise", "crash:SIGNAL", "exit:CODE", "memory:MIB"), slots,
    switch.
    """

    name: ClassVar[str] = "misbehave"
    kinds: ClassVar[tuple[str, ...]] = ("llm",)

    @classmethod
    def probe(cls, backend: str) -> Claims:
        """Nothing is needed."""
        return Claims(versions={})

    @classmethod
    def fixture(cls, backend: str) -> Fixture:
        """The synthetic engine's first case: left alone, this engine answers well."""
        fixture = SyntheticEngine.fixture(backend)
        model = Model(name="synthetic-misbehave", device="cpu")
        return Fixture(model=model, cases=fixture.cases[:1])

    def load(self, model: Model, scratch: Path, progress: LoadProgress) -> Ready:
        """Load as the option `load` says."""
        require_synthetic(model)
        known_options(model, ("load", "slots", "switch"))
        word, _, argument = option(model, "load", str, "").partition(":")
        if word and word not in AT_LOAD:
            raise refuse("load_failed", f"There is no misdeed {word!r} at the load.", "options.load")
        if word and _is_on(option(model, "switch", str, "")):
            AT_LOAD[word](argument, progress)
        return Ready(device="cpu", slots=option(model, "slots", int, 4))

    def run(self, job: Job) -> Outcome:
        """Misbehave as the prompt says, else echo."""
        params: work.LlmParams = job.params
        last = params.messages[-1].content if params.messages else params.prompt
        prompt = last if isinstance(last, str) else ""
        word, _, argument = prompt.partition(":")
        said = MISDEEDS[word](job, argument) if word in MISDEEDS else prompt
        job.emit(work.LlmChunk(delta=work.Delta(content=said)))
        usage: dict[str, float] = {"prompt_tokens": 1, "completion_tokens": 1}
        return Outcome(body=work.LlmResult(content=said), usage=usage)

    def cancel(self, job: Job) -> None:
        """Raise when the run is of the kind "cancel-raises"; the run itself obeys."""
        if job.params.prompt == "cancel-raises":
            raise RuntimeError("cancel raised, as asked")


_start()

ENGINE = Misbehave
