"""What a child does with an engine: serve the wire, or prove the engine and print JSON.

    serve     the wire (default)
    probe     import, claims, load the fixture, infer, check the answer: one JSON line per rung
    describe  the fixture as data, for a suite that drives the wire from outside
    check     judge an answer to case N: {"case", "body" (base64 msgpack), "files"} on stdin

Only `serve` speaks the wire; the others write JSON lines on its out end. They run here and not in the supervisor
because only this process may import the engine. What only they need is imported there: every engine starts by here.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from engines.runtime import confined
from engines.runtime import device as devices
from engines.runtime.contract import Case, Engine, Job
from engines.runtime.serve import fault_of, peak_rss_bytes, serve
from engines.runtime.stdio import Wire
from protocol import work


def engine_class(module: str) -> type[Engine]:
    """Import an engine module and return its `ENGINE`."""
    found = importlib.import_module(module).ENGINE
    if not (isinstance(found, type) and issubclass(found, Engine)):
        raise TypeError(f"{module}.ENGINE is not a subclass of engines.runtime.contract.Engine")
    return found


def run(mode: str, module: str, args: list[str], wire_in: int, wire_out: int) -> None:
    """Run one mode to its end."""
    if mode == "serve":
        serve(engine_class(module)(), Wire(wire_in, wire_out, json="--json" in args))
        return
    out = _Lines(wire_out)
    if mode == "probe":
        _probe(module, _value(args, "--backend"), _value(args, "--device") or "cpu", wire_in, out)
    elif mode == "describe":
        _describe(engine_class(module), _value(args, "--backend"), out)
    elif mode == "check":
        _check(engine_class(module), _value(args, "--backend"), wire_in, out)
    else:
        raise SystemExit(f"unknown mode {mode!r}")
    sys.stderr.flush()
    os._exit(0)


def _value(args: list[str], name: str) -> str:
    return args[args.index(name) + 1] if name in args else ""


class _Lines:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def write(self, **fields: Any) -> None:
        os.write(self._fd, msgspec.json.encode(fields) + b"\n")


def _probe(module: str, backend: str, device: str, wire_in: int, out: _Lines) -> None:
    """Climb the ladder; the last line written says how far it went, also when the process dies on the way.

    On a GPU the process stays after its answer until its input ends.
    """
    import tempfile

    try:
        out.write(rung="import", sandbox=confined.verdicts())
        engine = engine_class(module)
        claims = engine.probe(backend)
        out.write(rung="claims", claims=claims, licence=engine.licence, kinds=engine.kinds)
        fixture = engine.fixture(backend)
        with tempfile.TemporaryDirectory() as scratch:
            held = engine()  # and with it what it loaded
            _infer(held, fixture.model, fixture.cases[0], device, Path(scratch), out)
            if device.startswith("cuda"):
                _wait_for_end(wire_in)
    except BaseException as error:
        out.write(rung="fault", fault=fault_of(error, "load_failed"))


def _wait_for_end(wire_in: int) -> None:
    """Stay as we are, model loaded, until nobody writes to us any more: somebody asks the driver about us."""
    while os.read(wire_in, 4096):
        pass


def _infer(engine: Engine, model: Any, case: Case, device: str, scratch: Path, out: _Lines) -> None:
    out.write(rung="load")
    began = time.monotonic()
    asked = msgspec.structs.replace(model, device=device)
    devices.prepare(asked)
    ready = engine.load(asked, scratch, lambda *_: None)
    load_ms = (time.monotonic() - began) * 1000
    out.write(rung="infer", ready=ready, load_ms=load_ms)
    devices.refuse_fallback(asked, ready)
    params = work.parse_params(case.kind, case.params)
    engine.validate(case.kind, params)
    folder = scratch / "out"
    folder.mkdir()
    inputs = {name: Path(path) for name, path in case.inputs.items()}
    job = Job(case.kind, params, inputs=inputs, folder=folder)
    began = time.monotonic()
    outcome = engine.run(job)
    infer_ms = (time.monotonic() - began) * 1000
    wrong = case.check(outcome.body, [folder / file.name for file in job.files])
    out.write(rung="answer", wrong=wrong, infer_ms=infer_ms, rss_bytes=peak_rss_bytes())


def _case(case: Case) -> dict[str, Any]:
    return {"kind": case.kind, "params": case.params, "inputs": case.inputs, "stream": case.stream}


def _describe(engine: type[Engine], backend: str, out: _Lines) -> None:
    fixture = engine.fixture(backend)
    out.write(
        name=engine.name,
        kinds=engine.kinds,
        licence=engine.licence,
        backends=engine.backends,
        model=fixture.model,
        cases=[_case(case) for case in fixture.cases],
        endless=_case(fixture.endless) if fixture.endless else None,
        refused=fixture.refused,
    )


def _check(engine: type[Engine], backend: str, wire_in: int, out: _Lines) -> None:
    import base64
    import json

    with os.fdopen(wire_in, "rb") as stdin:
        asked = json.loads(stdin.read())
    case = engine.fixture(backend).cases[asked["case"]]
    type_ = work.RESULTS.get(case.kind, work.FreeResult)
    body = msgspec.msgpack.decode(base64.b64decode(asked["body"]), type=type_)
    out.write(wrong=case.check(body, [Path(path) for path in asked["files"]]))
