"""A worker that speaks GOLIAT, with a host that the test plays, and the fast times of tests."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import trio

from protocol import link_wire as wire
from protocol.engine_wire import OutputFile
from protocol.faults import Fault
from supervisor.host import work
from supervisor.host.ground import Ground
from supervisor.intake.admission import ModelState
from supervisor.link.attempts import Attempts
from supervisor.link.dialects.base import Home
from supervisor.link.dialects.goliat import Timing, open_goliat
from supervisor.link.keeping import OnDisk
from supervisor.link.outbox import Outbox
from supervisor.link.reconnect import Backoff, keep_link
from supervisor.link.session import Address, SessionEnd
from supervisor.link.worker import Identity, Worker
from supervisor.settings import CoordinatorTable, GoliatTable
from supervisor.store import open_store
from supervisor.suspend import Clocks
from supervisor.testing import FakeHost, FakeRun

MODEL, MACHINE, STUDY = "goliat", "box", "phantoms"
PATIENCE_S = 60.0
FAST = Timing(every_s=0.01, settle_s=0.01, pause_s=(0.01, 0.02), config_patience_s=0.2)


def finish(run: FakeRun, files: dict[str, bytes] | None = None, lines: tuple[str, ...] = ()) -> None:
    """End a run well, as the engine would."""
    outputs = []
    for name, content in (files or {}).items():
        (run.request.folder / name).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        outputs.append(OutputFile(name, "application/octet-stream", len(content), digest))
    run.done({"exit_code": 0, "output_tail": list(lines)}, outputs)


def exit_with(run: FakeRun, code: int, lines: tuple[str, ...] = ()) -> None:
    """End a run as the engine does when the program ended with `code`."""
    memory = code == 42
    detail: dict[str, Any] = {"exit_code": code, "stderr_tail": list(lines)}
    sentence = f"The program ended with exit code {code}."
    fault = Fault("out_of_memory" if memory else "command_failed", sentence, retryable=memory or None, detail=detail)
    run.end(work.Failed(fault=fault))


def line(run: FakeRun, number: int, text: str) -> None:
    """The program printed a line."""
    run._on_event(work.Progress(number, None, "output", text))


def params(run: FakeRun) -> dict[str, Any]:
    """What the run was asked for."""
    found: dict[str, Any] = msgspec.msgpack.decode(run.request.params)
    return found


class Bench:
    """One worker."""

    def __init__(self, worker: Worker, attempts: Attempts, host: FakeHost) -> None:
        self.worker, self.attempts, self.host = worker, attempts, host
        self.ends: list[SessionEnd] = []
        self.paused = ""
        self.limits: dict[str, Any] = {}

    def pause(self, reason: str) -> None:
        """Take no jobs, or take them again with ""."""
        self.paused = reason
        self.worker.announce()

    async def next_run(self) -> FakeRun:
        """The next study that begins."""
        run = await self.host.next_run()
        run.start()
        return run

    async def until(self, true: Callable[[], object]) -> None:
        """Wait for something that nobody tells of."""
        with trio.fail_after(PATIENCE_S):
            while not true():
                with trio.move_on_after(0.01):
                    await trio.sleep_forever()

    async def empty(self) -> None:
        """Wait until nothing is held."""
        with trio.fail_after(PATIENCE_S):
            await self.attempts.ledger.wait_empty()


@contextlib.asynccontextmanager
async def open_bench(
    folder: Path,
    url: str,
    protocol: str,
    *,
    timing: Timing = FAST,
    beat_s: float = 0.05,
    budget_bytes: int = 2**30,
    clocks: Clocks | None = None,
) -> AsyncIterator[Bench]:
    """A worker that is looking for its dashboard at `url`."""
    host = FakeHost()
    table = GoliatTable(
        protocol="planned" if protocol == "planned" else "shipped",
        machine_id=MACHINE,
        model=MODEL,
        study=STUDY,
        heartbeat_s=beat_s,
        poll_s=0.02,
    )
    home = Home(
        table=CoordinatorTable(url=url, dialect="goliat", goliat=table),
        address=Address(url=url, token="", connect_s=5.0),
        folder=folder / "goliat",
        name="w1",
    )
    ground = Ground(folder / "ground")
    models = {MODEL: ModelState(kinds=("command",))}

    def offered(reason: str) -> wire.Capabilities:
        model = wire.ModelOffer(name=MODEL, kinds=("command",), engine="command", limits=bench.limits)
        return wire.Capabilities(models=(model,), version="1", accepting=not reason, reason=reason)

    async with (
        open_store(folder / "records") as store,
        open_goliat(home, timing, clocks) as spoken,
        trio.open_nursery() as nursery,
    ):
        keeping = OnDisk(store, Outbox(folder / "outbox", budget_bytes))
        attempts = Attempts(host, spoken.delivery, lambda _model: ground, nursery, keeping=keeping)
        attempts.restore(await keeping.restore())
        worker = Worker(
            Identity(name="w1", boot="b1"),
            attempts,
            offered=offered,
            models=lambda: models,
            on_shutdown=lambda _reason: None,
            held=lambda: (bench.paused, None),
        )
        bench = Bench(worker, attempts, host)

        async def converse() -> SessionEnd:
            bench.ends.append(await spoken.converse(worker))
            return bench.ends[-1]

        async def link() -> None:
            await keep_link(converse, Backoff(0.01, 0.05))

        nursery.start_soon(link)
        yield bench
        nursery.cancel_scope.cancel()
