"""Jobs of mixed kinds from a seed, and what each must bring: the synthetic engine, asked here without any wire."""

from __future__ import annotations

import base64
import io
import random
import tempfile
import wave
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from engines.runtime.contract import Job, Model
from engines.synthetic.engine import SyntheticEngine
from protocol import work

MODEL, PROGRAM = "synthetic", "effect"
# Of twelve jobs: streams and short texts are the most, as they are in life.
KINDS = ("chat", "chat", "chat", "llm", "llm", "embedding", "tts", "image", "stt", "speech", "command", "command")


class Ask(NamedTuple):
    """One job.

    Attributes:
        kind: a task kind; "chat" is an llm job that a client waits for, piece by piece.
        body: of the request.
        audio: input file of `audio_stt`.
    """

    mark: str
    kind: str
    body: dict[str, Any]
    audio: bytes = b""

    @property
    def text(self) -> str:
        """What a chat has to answer."""
        return str(self.body["messages"][-1]["content"])


def asks(count: int, seed: int) -> list[Ask]:
    """So many jobs, the same for the same seed."""
    dice = random.Random(seed)
    return [_ask(f"j{seed}n{number}", dice.choice(KINDS), dice) for number in range(count)]


def _ask(mark: str, kind: str, dice: random.Random) -> Ask:
    words = " ".join(f"{mark}-{index}" for index in range(dice.randrange(5, 80)))
    if kind == "chat":
        return Ask(mark, kind, {"model": MODEL, "messages": [{"role": "user", "content": words}], "stream": True})
    audio = _wav(dice.randbytes(dice.randrange(1_000, 40_000) * 2)) if kind == "stt" else b""
    params: dict[str, Any] = {
        "llm": lambda: {"messages": [{"role": "user", "content": words}]},
        "embedding": lambda: {
            "input": [f"{mark} {row}" for row in range(dice.randrange(1, 40))],
            "dimensions": dice.choice((8, 64, 1024)),
        },
        "tts": lambda: {"text": mark, "voice": "any", "format": "wav"},
        "speech": lambda: {"text": (mark * 100)[:400], "voice": "any", "speed": 0.25, "format": "pcm"},
        "image": lambda: {"prompt": words[:200], "width": 256, "height": 256, "n": dice.randrange(1, 4)},
        "stt": dict,
        "command": lambda: {"args": {"mark": mark}},
    }[kind]()
    wire_kind = {"tts": "audio_tts", "speech": "audio_tts", "stt": "audio_stt"}.get(kind, kind)
    body = {"kind": wire_kind, "model": PROGRAM if kind == "command" else MODEL, "params": params}
    if audio:
        body["inputs"] = {"audio": "data:audio/wav;base64," + base64.b64encode(audio).decode()}
    return Ask(mark, wire_kind, body, audio)


def _wav(samples: bytes) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(samples)
    return out.getvalue()


class Expected(NamedTuple):
    """What a job brings: the result struct, and name -> content of its files."""

    body: Any
    files: dict[str, bytes]


class Oracle:
    """The engine itself, in this process."""

    def __init__(self) -> None:
        self._engine = SyntheticEngine()
        self._engine.load(Model(name=MODEL), Path(), lambda *_: None)

    def expected(self, ask: Ask) -> Expected:
        """Run the job here."""
        params = work.parse_params(ask.kind, ask.body["params"])
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            inputs = {}
            if ask.audio:
                inputs["audio"] = folder / "audio.in"
                inputs["audio"].write_bytes(ask.audio)
            job = Job(ask.kind, params, inputs=inputs, folder=folder)
            outcome = self._engine.run(job)
            return Expected(outcome.body, {file.name: (folder / file.name).read_bytes() for file in job.files})


def decoded(kind: str, answer: bytes) -> Any:
    """The result struct from the JSON of /v1/jobs/{id}/result."""
    return msgspec.json.decode(answer, type=work.RESULTS[kind])
