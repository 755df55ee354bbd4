"""Counts words: a whole engine for Bulkhead in one file, from a repository that is not Bulkhead's.

Kind `x-wordcount`. Parameters: `text`, or an input file named "text"; `top`, how many of the commonest words to
list. The result's `output` holds words, distinct and top; the full table is the output file counts.json.
"""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

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
    option,
    refuse,
)
from protocol.work import FreeResult

KIND = "x-wordcount"
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
# One report per this many words keeps the wire quiet and a cancel quick.
REPORT_EVERY = 1000


class Params(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a job may ask; also the schema that the engine declares."""

    text: Annotated[str, msgspec.Meta(max_length=2_000_000)] | None = None
    top: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 3


class WordcountEngine(Engine):
    """Load options: slots; stop_words, a list that is not counted; pause_ms, after each report (to be polite)."""

    name: ClassVar[str] = "wordcount"
    kinds: ClassVar[tuple[str, ...]] = (KIND,)

    @classmethod
    def probe(cls, backend: str) -> Claims:
        """msgspec is all that it needs."""
        return Claims(versions={"msgspec": msgspec.__version__})

    @classmethod
    def fixture(cls, backend: str) -> Fixture:
        """A sentence whose words anybody can count."""
        sentence = "the cat sees the dog and the dog sees THE cat"
        return Fixture(
            model=Model(name="wordcount-fixture", device="cpu", options={"slots": 4, "pause_ms": 5.0}),
            cases=(
                Case(kind=KIND, params={"text": sentence, "top": 2}, check=_check_sentence),
                Case(kind=KIND, params={"text": "", "top": 0}, check=_check_nothing),
            ),
            endless=Case(kind=KIND, params={"text": "a " * 1_000_000}, check=lambda _body, _files: ""),
            refused=((KIND, {"text": 5}), (KIND, {"text": "x", "top": -1}), (KIND, {"text": "x", "colour": 1})),
        )

    def load(self, model: Model, scratch: Path, progress: LoadProgress) -> Ready:
        """There is no model file; the options are all."""
        known_options(model, ("slots", "stop_words", "pause_ms"))
        self._stop_words = frozenset(option(model, "stop_words", list[str], []))
        self._pause_s = option(model, "pause_ms", Annotated[float, msgspec.Meta(ge=0)], 0.0) / 1000
        slots = option(model, "slots", Annotated[int, msgspec.Meta(ge=1, le=64)], 4)
        return Ready(device="cpu", slots=slots, schema=msgspec.json.schema(Params))

    def validate(self, kind: str, params: Any) -> None:
        """Refuse what does not fit the schema. Raises FaultError, naming the field."""
        _parse(params)

    def run(self, job: Job) -> Outcome:
        """Count, with progress per thousand words."""
        params = _parse(job.params)
        counts: collections.Counter[str] = collections.Counter()
        for number, word in enumerate(_words(job, params), 1):
            if word not in self._stop_words:
                counts[word] += 1
            if number % REPORT_EVERY == 0:
                job.progress(number, None, "count")
                job.cancelled.wait(self._pause_s)
                job.check_cancelled()
        table = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        job.save("counts.json", "application/json", json.dumps(dict(table)).encode())
        output = {"words": counts.total(), "distinct": len(counts), "top": table[: params.top]}
        return Outcome(body=FreeResult(output=output), usage={"documents": 1})


def _parse(params: Any) -> Params:
    try:
        return msgspec.convert(params, type=Params)
    except msgspec.ValidationError as error:
        found = re.search(r"`\$?\.?(\w+)`", str(error))
        raise refuse("invalid_parameter", f"{error}.", found[1] if found else None) from None


def _words(job: Job, params: Params) -> Iterator[str]:
    if params.text is not None:
        yield from (match[0] for match in _WORD.finditer(params.text.lower()))
    elif "text" in job.inputs:
        with job.inputs["text"].open(encoding="utf-8", errors="replace") as file:
            for line in file:
                yield from (match[0] for match in _WORD.finditer(line.lower()))
    else:
        raise refuse("invalid_request", "Give `text`, or an input file named text.", "text")


def _check_sentence(body: FreeResult, files: Sequence[Path]) -> str:
    wanted = {"words": 11, "distinct": 5, "top": [["the", 4], ["cat", 2]]}
    found = json.loads(json.dumps(body.output))
    if found != wanted:
        return f"counted {found}"
    table = json.loads(files[0].read_bytes())
    return "" if table == {"the": 4, "cat": 2, "dog": 2, "sees": 2, "and": 1} else f"listed {table}"


def _check_nothing(body: FreeResult, files: Sequence[Path]) -> str:
    return "" if body.output == {"words": 0, "distinct": 0, "top": []} else f"counted {body.output}"


ENGINE = WordcountEngine
