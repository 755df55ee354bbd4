"""The server engine: a long-lived server behind the one contract of all engines.

Either the operator gives a program that we start and keep (`argv`), or the address of a server that already runs
(`url`). A server of ours that dies takes this process with it: the host sees the exit code, and starts us again.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

from engines.runtime.contract import (
    Case,
    Claims,
    Engine,
    FaultError,
    Fixture,
    Job,
    LoadProgress,
    Model,
    Outcome,
    Ready,
    refuse,
)
from engines.server import config as configuration
from engines.server import gradio, openai
from engines.server.calls import Call, Origin
from engines.server.own import OwnServer, wait_healthy
from protocol.work import LlmResult

# EX_UNAVAILABLE: our server is gone, and so are we.
EXIT_SERVER_DIED = 69
# After its death, runs get this long to tell their callers before the process ends.
LAST_WORDS_S = 2.0
NOTICE_S = 1.0
LIST_TIMEOUT_S = 10.0


class ServerEngine(Engine):
    """Reaches one server; load options in `config.Config`."""

    name: ClassVar[str] = "server"
    kinds: ClassVar[tuple[str, ...]] = configuration.KINDS

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._calls: dict[int, Call] = {}
        self._own: OwnServer | None = None

    @classmethod
    def probe(cls, backend: str) -> Claims:
        """Only the HTTP client is a library of ours; what the server can do is its own affair."""
        return Claims(versions={"httpx": metadata.version("httpx")})

    @classmethod
    def fixture(cls, backend: str) -> Fixture:
        """llama.cpp's own server on the chat fixture. Raises ImportError without xllamacpp."""
        return _fixture()

    def load(self, model: Model, scratch: Path, progress: LoadProgress) -> Ready:
        """Start the server (or find it), wait until it is healthy, look at what it serves."""
        self._config = config = configuration.read(model)
        self._kinds = configuration.kinds_of(model, config)
        self._served = config.served_model or model.name
        if config.argv:
            self._own = OwnServer(config, model, scratch.absolute(), self._on_death)
            try:
                self._own.wait_healthy(progress)
            except FaultError as error:
                self._own.stop()
                raise self._own.failed(error) from None
            self._origin = self._own.origin
        else:
            self._origin = Origin.at(config.url, key=_key(config))
            wait_healthy(config, self._origin, progress, threading.Event())
        limits = {"vram_gb": config.vram_gb, "declared": True, "kinds": list(self._kinds), **self._listed()}
        device = config.device or ("cpu" if config.argv and not config.vram_gb else "unknown")
        return Ready(device=device, slots=config.slots, versions=self.probe("").versions, limits=limits)

    def validate(self, kind: str, params: Any) -> None:
        """Refuse kinds and parameters that this server does not serve. Raises FaultError."""
        if kind not in self._kinds:
            raise refuse("unsupported", f"This server is not configured for {kind}.", "kind")
        if self._config.api == "gradio":
            gradio.validate(self._config, params)
        else:
            openai.validate(self._config, params)

    def run(self, job: Job) -> Outcome:
        """One job = one call (one per picture of an image job)."""
        call = Call(self._origin)
        with self._lock:
            self._calls[id(job)] = call
        if job.cancelled.is_set():
            call.abort()
        try:
            if self._config.api == "gradio":
                return gradio.run(self._config, call, job)
            return openai.run(self._config, self._served, call, job)
        except FaultError as error:
            job.check_cancelled()
            died = self._own.died(NOTICE_S if error.fault.may_retry else 0) if self._own else None
            raise (died or error) from None
        finally:
            with self._lock:
                del self._calls[id(job)]
                self._lock.notify_all()

    def cancel(self, job: Job) -> None:
        """Hang up; the server stops for a client that is gone."""
        with self._lock:
            call = self._calls.get(id(job))
        if call is not None:
            call.abort()

    def close(self) -> None:
        """End our server; it would end with this process anyway."""
        if self._own is not None:
            self._own.stop()

    def _on_death(self, sentence: str) -> None:
        """Let open runs tell of it, then end: the host starts a fresh process with a fresh server."""
        sys.stderr.write(sentence + "\n")
        with self._lock:
            self._lock.wait_for(lambda: not self._calls, LAST_WORDS_S)
        time.sleep(0.1)  # their faults are written by other threads
        sys.stderr.flush()
        os._exit(EXIT_SERVER_DIED)

    def _listed(self) -> dict[str, Any]:
        """What the server says of its models, where it says anything."""
        if self._config.api == "gradio":
            return {}
        try:
            found = Call(self._origin).json("GET", self._config.route("models"), timeout_s=LIST_TIMEOUT_S)
            models = {str(item["id"]): item for item in found["data"]}
        except (FaultError, KeyError, TypeError):
            return {}
        if self._config.served_model and models and self._served not in models:
            names = ", ".join(sorted(models))
            raise refuse(
                "load_failed", f"The server has no model {self._served!r}; it has: {names}.", "options.served_model"
            )
        one = models.get(self._served) or (next(iter(models.values())) if len(models) == 1 else {})
        length = one.get("max_model_len")
        return {"models": sorted(models)} | ({"n_ctx": length} if isinstance(length, int) else {})


def _key(config: configuration.Config) -> str:
    if not config.key_env:
        return ""
    if config.key_env not in os.environ:
        raise refuse(
            "load_failed",
            f"The environment variable {config.key_env} is not set; grant it in [engines.server] env.",
            "options.key_env",
        )
    return os.environ[config.key_env]


# ---- fixture

_HERE = Path(__file__).parent


def _fixture() -> Fixture:
    if importlib.util.find_spec("xllamacpp") is None:
        raise ImportError("the fixture of this engine is llama.cpp's server: install the extra `llm`")
    argv = [sys.executable, str(_HERE / "llamacpp_server.py"), "--model", "{model}", "--socket", "{socket}"]
    options = {
        "argv": [*argv, "--slots", "4", "--ctx", "512"],
        "slots": 4,
        "start_s": 60.0,
        "features": ["grammar", "json_schema"],
    }
    gguf = _HERE.parent / "llm" / "fixture" / "chat-q8_0.gguf"
    model = Model(
        name="fixture-server", kinds=("llm", "embedding"), files={"model": str(gguf)}, device="cpu", options=options
    )
    count = {"messages": [{"role": "user", "content": "count to 5"}], "temperature": 0.0}
    # A grammar that never lets the model stop, and enough tokens for minutes.
    endless = {"prompt": "hello", "max_tokens": 2_000_000, "grammar": 'root ::= "ab " root'}
    return Fixture(
        model=model,
        cases=(
            Case(kind="llm", params=count, stream=True, check=_check_count),
            Case(kind="embedding", params={"input": ["hello", "count to 5"]}, check=_check_vectors),
        ),
        endless=Case(kind="llm", params=endless, stream=True, check=lambda _body, _files: ""),
        refused=(
            ("llm", {**count, "tools": [{"type": "function", "function": {"name": "f"}}]}),
            ("image", {"prompt": "x"}),
        ),
    )


def _check_count(body: LlmResult, files: Sequence[Path]) -> str:
    return "" if body.content == "1 2 3 4 5" else f"counts {body.content!r}"


def _check_vectors(body: Any, files: Sequence[Path]) -> str:
    return "" if body.count == 2 and len(body.vectors) == 8 * body.dimensions else "not two vectors"


ENGINE = ServerEngine
