"""An engine of somebody else's: kind `x-shout`, and on demand (WORDY in its environment) one misbehaviour."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from engines.runtime.contract import Case, Claims, Engine, Fixture, Job, LoadProgress, Model, Outcome, Ready, refuse
from protocol.work import FreeResult

WRONG = os.environ.get("WORDY", "")

if WRONG == "crash-import":
    os.kill(os.getpid(), signal.SIGSEGV)
if WRONG == "no-library":
    import a_library_that_is_not_installed  # noqa: F401
if WRONG == "no-shared-object":
    raise ImportError("libcublas.so.12: cannot open shared object file: No such file or directory")


def _shouted(result: Any, files: Any) -> str:
    return "" if result.output == {"text": "HELLO"} else f"got {result.output!r}"


class Wordy(Engine):
    name = "wordy"
    kinds = ("x-shout",)
    licence = "AGPL-3.0" if WRONG == "licence" else "MIT"

    @classmethod
    def probe(cls, backend: str) -> Claims:
        if WRONG == "exit":
            os._exit(3)
        return Claims(versions={"wordy": "1.0"}, devices=("cpu", "cuda"))

    @classmethod
    def fixture(cls, backend: str) -> Fixture:
        here = str(Path(__file__))
        return Fixture(
            model=Model(name="wordy-fixture", files={} if WRONG == "no-files" else {"model": here}),
            cases=(Case(kind="x-shout", params={"text": "hello"}, check=_shouted, stream=True),),
            endless=Case(kind="x-shout", params={"text": "hello", "for_s": 60}, check=_shouted),
            refused=(("x-shout", {"text": 7}),),
        )

    def load(self, model: Model, scratch: Path, progress: LoadProgress) -> Ready:
        progress(1, 1, "load")
        if WRONG == "hang-load":
            Path("hangs").touch()
            time.sleep(600)
        if WRONG == "crash-load":
            os.abort()
        if WRONG == "noise":
            os.write(_wire_fd(), b"hello from a library\n")
        if model.files and not Path(model.files["model"]).exists():
            if WRONG == "die-on-bad-model":
                os._exit(1)
            raise refuse("load_failed", "The model file does not exist.", "files.model")
        if WRONG == "holds-gpu":  # as the simulated reader counts it (engines/telemetry/simulated.py)
            Path("vram.json").write_text('{"uuid": "GPU-sim-0", "bytes": 1048576}')
        device = "cuda:0" if model.device == "cuda" and WRONG.endswith("gpu") else "cpu"
        return Ready(device=device, slots=2, schema={"type": "object"}, versions={"wordy": "1.0"})

    def validate(self, kind: str, params: Any) -> None:
        if not isinstance(params.get("text"), str) and WRONG != "accept-all":
            field = None if WRONG == "no-field" else "text"
            raise refuse("invalid_parameter", "text: expected a text.", field)

    def run(self, job: Job) -> Outcome:
        until = time.monotonic() + job.params.get("for_s", 0)
        while time.monotonic() < until:
            if WRONG != "deaf":
                job.check_cancelled()
            time.sleep(0.01)
        text = str(job.params.get("text")).upper()
        if WRONG == "always-chunks":
            job.stream = True
        if WRONG != "silent-stream":
            job.emit({"text": text})
        return Outcome(body=FreeResult(output={"text": "WRONG" if WRONG == "answer" else text}))


def _wire_fd() -> int:
    """The private duplicate of fd 1: the highest pipe that can be written."""
    for fd in range(16, 2, -1):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        if target.startswith("pipe:") and target != os.readlink("/proc/self/fd/2"):
            flags = int(Path(f"/proc/self/fdinfo/{fd}").read_text().split("flags:")[1].split()[0], 8)
            if flags & os.O_WRONLY:
                return fd
    sys.exit("no wire found")


ENGINE = Wordy
