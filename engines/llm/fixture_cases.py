"""Questions to the shipped chat model whose answers are known.

The model (383,000 parameters, context 512) was trained on six tasks: count to N, say X, a plus b, spell w, ping,
hello. It answers greedily and exactly.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engines.runtime.contract import Case, Fixture, Model
from protocol.work import LlmResult

MODEL = Path(__file__).with_name("fixture") / "chat-q8_0.gguf"

# A grammar that is always in 3000 states at once: each token costs milliseconds, and it never allows an end.
_STATES = 3000


def fixture(backend: str) -> Fixture:
    """The model and its questions, for either backend."""
    return Fixture(
        model=Model(
            name="fixture-chat",
            kinds=("llm",),
            files={"model": str(MODEL)},
            backend=backend,
            options={"threads": 1},  # faster than two for a model this small
        ),
        cases=(
            Case(kind="llm", params=_ask("count to 12"), check=_says(_count(12)), stream=True),
            Case(kind="llm", params=_ask("say hello world"), check=_says("hello world")),
            Case(kind="llm", params=_ask("count to 40", stop=["17"]), check=_says(_count(16) + " ")),
            Case(kind="llm", params={"prompt": _raw("count to 5"), "temperature": 0}, check=_says(_count(5))),
            Case(kind="llm", params=_ask("hello", json_schema=_SCHEMA), check=_picks),
        ),
        endless=Case(kind="llm", params=_endless(), check=_any_text, stream=True),
        refused=(
            ("llm", _ask("ping", grammar="root ::= (((")),
            ("llm", _ask("ping", grammar="root ::= missing")),
            ("llm", _ask("say " + "x" * 600)),
        ),
    )


_SCHEMA = {
    "type": "object",
    "properties": {"n": {"enum": [1, 2]}},
    "required": ["n"],
    "additionalProperties": False,
}


def _ask(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, **more}


def _raw(text: str) -> str:
    """What the model's chat template makes of one message."""
    return f"<|user|>{text}<|end|><|assistant|>"


def _count(n: int) -> str:
    return " ".join(str(number) for number in range(1, n + 1))


def _endless() -> dict[str, Any]:
    names = [f"r{number}" for number in range(_STATES)]
    rules = "\n".join(f"{name} ::= [^\\x00] {name}" for name in names)
    return {"prompt": "count", "grammar": f"root ::= {' | '.join(names)}\n{rules}", "temperature": 0}


def _says(expected: str) -> Callable[[LlmResult, Sequence[Path]], str]:
    def check(result: LlmResult, _files: Sequence[Path]) -> str:
        return "" if result.content == expected else f"expected {expected!r}, got {result.content!r}"

    return check


def _picks(result: LlmResult, _files: Sequence[Path]) -> str:
    try:
        found = json.loads(result.content or "")
    except ValueError:
        return f"not JSON: {result.content!r}"
    return "" if found in ({"n": 1}, {"n": 2}) else f"does not meet the schema: {found!r}"


def _any_text(result: LlmResult, _files: Sequence[Path]) -> str:
    return "" if result.content else "no text"
