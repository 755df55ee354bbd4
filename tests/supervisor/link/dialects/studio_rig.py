"""A worker that speaks the studio dialect, with a host that the test plays, and the fast times of tests."""

from __future__ import annotations

import contextlib
import hashlib
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import trio

from protocol import link_wire as wire
from protocol.engine_wire import OutputFile
from protocol.faults import Fault
from supervisor.host.ground import Ground
from supervisor.intake.admission import ModelState
from supervisor.intake.observed import Person
from supervisor.link.attempts import Attempts
from supervisor.link.dialects.base import Home, Spoken
from supervisor.link.dialects.studio import Timing, open_studio
from supervisor.link.dialects.studio_frames import KINDS
from supervisor.link.dialects.studio_register import Credentials, CredentialsFile, base_url
from supervisor.link.dialects.studio_session import Pace
from supervisor.link.keeping import OnDisk
from supervisor.link.outbox import Outbox
from supervisor.link.reconnect import Backoff, keep_link
from supervisor.link.session import Address, SessionEnd
from supervisor.link.worker import Identity, Worker
from supervisor.roster import Origin
from supervisor.settings import CoordinatorTable, ModelTable, StudioTable
from supervisor.store import open_store
from supervisor.suspend import Clocks
from supervisor.testing import FakeHost, FakeRun
from supervisor.testing_studio import StudioServer

PATIENCE_S = 90.0  # of a wait; no machine is so slow
FAST = Timing(
    pace=Pace(beat_s=0.1, soonest_s=0.02, silent_s=5.0, connect_s=5.0, tick_s=0.02, close_s=0.1),
    poll_s=0.05,
    aside_s=30.0,
    answer_s=5.0,
    ack_s=60.0,
    duplicate_s=(4.0, 4.0),
    upload_s=(0.01, 0.02),
)

TASKS: dict[str, dict[str, Any]] = {
    "llm": {"kind": "llm", "messages": [{"role": "user", "content": "hi"}]},
    "audio_stt": {"kind": "audio_stt", "inputUrl": "/goods/speech.wav"},
    "image": {"kind": "image", "prompt": "a red square", "ext": "png"},
    "audio_tts": {"kind": "audio_tts", "text": "hello"},
    "video": {"kind": "video", "prompt": "a red film", "seconds": 1},
}
RESULTS: dict[str, Any] = {
    "llm": {"content": "hello", "finish_reason": "stop"},
    "audio_stt": {"text": "said", "language": "en", "duration": 1.5},
    "image": {"width": 512, "height": 512, "format": "png", "seeds": [1]},
    "audio_tts": {"sample_rate": 22050, "duration": 1.0, "format": "wav"},
    "video": {"width": 512, "height": 512, "frames": 12, "fps": 12, "format": "mp4", "codec": "h264", "seed": 1},
}
MODELS = {kind: f"{kind}-model" for kind in KINDS}


def finish(run: FakeRun, content: bytes = b"file content") -> None:
    """End a run well, as an engine of its kind would."""
    run.start()
    kind = run.request.kind
    files = []
    if kind in ("image", "audio_tts", "video"):
        (run.request.folder / "out.bin").write_bytes(content)
        files = [OutputFile("out.bin", "application/octet-stream", len(content), hashlib.sha256(content).hexdigest())]
    run.done(RESULTS[kind], files, prompt_tokens=3, completion_tokens=2, compute_ms=7)


class HeldRun:
    """A run that waits for the test."""

    def __init__(self, run: FakeRun) -> None:
        self.run = run
        self.kind = run.request.kind

    def finish(self, content: bytes = b"file content") -> None:
        """End well."""
        finish(self.run, content)

    def fail(self, code: str) -> None:
        """End badly."""
        self.run.fail(code, f"It ended with {code}.")


class BenchRoll:
    """The models of the bench's worker: one for each kind, and those that are taken on; a `Roll`."""

    def __init__(self) -> None:
        self.kinds: dict[str, tuple[str, ...]] = {model: (kind,) for kind, model in MODELS.items()}
        self.origins = dict.fromkeys(self.kinds, Origin.CONFIG)
        self.on_change: Callable[[], None] = lambda: None

    def offers(self) -> tuple[wire.ModelOffer, ...]:
        """As they are announced."""
        return tuple(wire.ModelOffer(name=name, kinds=kinds, engine="synthetic") for name, kinds in self.kinds.items())

    def origin(self, model: str) -> Origin | None:
        """See `Roll`."""
        return self.origins.get(model)

    async def take_on(self, table: ModelTable, origin: Origin = Origin.ORDER) -> Fault | None:
        """See `Roll`."""
        await trio.lowlevel.checkpoint()
        self.kinds[table.name], self.origins[table.name] = tuple(KINDS), origin
        self.on_change()
        return None

    async def let_go(self, model: str, _reason: str) -> Fault | None:
        """See `Roll`."""
        await trio.lowlevel.checkpoint()
        del self.kinds[model], self.origins[model]
        self.on_change()
        return None


class Bench:
    """One worker; a `WorkerUnderTest`."""

    spoken: Spoken
    roll: BenchRoll

    def __init__(self, worker: Worker, attempts: Attempts, host: FakeHost) -> None:
        self.worker, self.attempts, self.host = worker, attempts, host
        self.ends: list[SessionEnd] = []
        self.over = trio.Event()
        self.paused = ""
        self.person = Person()

    async def play(self) -> None:
        """Finish every run as it comes, for ever."""
        while True:
            finish(await self.host._arrivals.receive())

    async def next_run(self) -> HeldRun:
        """See the suite."""
        return HeldRun(await self.host.next_run())

    def pause(self, reason: str) -> None:
        """See the suite."""
        self.paused = reason
        self.worker.announce()

    def sits(self, here: bool | None) -> None:
        """See the suite."""
        self.person = Person(first=here is not None, here=here)
        self.pause("the machine is in use" if here else "")

    def drain(self, reason: str) -> None:
        """See the suite of models."""
        self.worker.drain(reason)

    def log(self, message: str) -> bool:
        """See the suite."""
        line = wire.LogLine(ts="2026-01-01T00:00:00.000Z", level="warning", message=f"supervisor.x: {message}")
        return self.worker.say(wire.LogBatch(lines=(line,), dropped=2))

    async def refused(self) -> str:
        """See the suite."""
        with trio.fail_after(PATIENCE_S):
            await self.over.wait()
        return self.ends[-1].sentence

    async def empty(self) -> None:
        """See the suite."""
        with trio.fail_after(PATIENCE_S):
            await self.attempts.ledger.wait_empty()


@contextlib.asynccontextmanager
async def open_bench(
    folder: Path,
    url: str,
    *,
    timing: Timing = FAST,
    play: bool = True,
    vram_gb: float = 24.0,
    clocks: Clocks | None = None,
    tls: ssl.SSLContext | None = None,
    downloads: bool = False,
) -> AsyncIterator[Bench]:
    """A worker that is looking for its studio at `url`; with `downloads` it fetches models from this machine, too."""
    host = FakeHost()
    studio = StudioTable(vram_gb=vram_gb)
    if downloads:
        studio = msgspec.structs.replace(studio, models="download", hosts=["127.0.0.1"], models_gb=0.01)
    home = Home(
        table=CoordinatorTable(url=url, dialect="studio", studio=studio),
        address=Address(url=url, token="", tls=tls),
        folder=folder / "studio",
        name="w1",
        person=lambda: bench.person,
        roll=(roll := BenchRoll()),
    )
    ground = Ground(folder / "ground")
    async with (
        open_store(folder / "records") as store,
        open_studio(home, timing, clocks) as spoken,
        trio.open_nursery() as nursery,
    ):
        keeping = OnDisk(store, Outbox(folder / "outbox", 2**30))
        attempts = Attempts(host, spoken.delivery, lambda _model: ground, nursery, keeping=keeping)
        attempts.restore(await keeping.restore())

        def held() -> tuple[str, float | None]:
            return bench.paused, None

        worker = Worker(
            Identity(name="w1", boot="b1"),
            attempts,
            offered=lambda reason: wire.Capabilities(
                models=roll.offers(), version="1", accepting=not reason, reason=reason
            ),
            models=lambda: {name: ModelState(kinds=kinds) for name, kinds in roll.kinds.items()},
            on_shutdown=lambda _reason: None,
            held=held,
        )
        roll.on_change = worker.announce
        bench = Bench(worker, attempts, host)
        bench.roll = roll
        bench.spoken = spoken

        async def converse() -> SessionEnd:
            bench.ends.append(await spoken.converse(worker))
            return bench.ends[-1]

        async def link() -> None:
            await keep_link(converse, Backoff(0.01, 0.05))
            bench.over.set()

        nursery.start_soon(link)
        if play:
            nursery.start_soon(bench.play)
        yield bench
        nursery.cancel_scope.cancel()


def admitted(folder: Path, server: StudioServer, worker: str = "w-1", token: str = "t0ken") -> None:
    """This folder's worker was approved long ago."""
    known = Credentials(
        install_id="i", studio=base_url(server.url), worker_id=worker, auth_token=server.admit(worker, token)[1]
    )
    CredentialsFile(folder / "studio").write(known)
