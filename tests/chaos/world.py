"""A coordinator and a supervisor as programs of their own, the proxy between them, clients beside them, and a judge."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec
import trio

from protocol.faults import Fault
from tests.chaos.asks import Ask, Expected, Oracle, decoded
from tests.chaos.proxy import CALM, Odds, Proxy

PATIENCE_S = 60.0
# Of one stream, from asking to its end: it waits behind what others asked for, through the lives of a worker that is
# killed, on a machine that may have much else to do.
STREAM_S = 300.0
LOOK_S = 0.05
IMPATIENT = Path(__file__).parent / "impatient.py"
ENDS = ("succeeded", "failed", "cancelled")
CLIENTS = 8
MOST_TRIES = 3
# Says which attempt ran, outside of everything that an attempt leaves behind; then takes a moment.
EFFECT = 'printf "%s %s\\n" "$(basename "$1")" "$2" >> "$3"; sleep 0.05'


class Seen(NamedTuple):
    """What a client of a stream saw.

    Attributes:
        said: all pieces.
        end: "done", a fault's code, or "torn" when there was neither.
    """

    said: str
    end: str


class World:
    """See the module. Made by `open_world`."""

    def __init__(self, folder: Path, tls: tuple[Path, Path] | None) -> None:
        self.folder, self.tls = folder, tls
        self.desk, self.far, self.effects = folder / "desk", folder / "far", folder / "effects"
        self.proxy: Proxy
        self.client: httpx.AsyncClient
        self.coordinator: subprocess.Popen[bytes]
        self.worker: subprocess.Popen[bytes] | None = None
        self.kills = 0
        self.jobs: dict[str, Ask] = {}
        self.streams: dict[str, Seen] = {}

    # ---- programs

    def _run(self, name: str, *argv: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, str(IMPATIENT), *argv], stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )

    def words(self, name: str) -> str:
        """What a program has written."""
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    async def start_coordinator(self) -> str:
        """Start it; returns its address."""
        secure = ["--tls-cert", str(self.tls[0]), "--tls-key", str(self.tls[1])] if self.tls else []
        argv = ["coordinator", "serve", "--listen", "127.0.0.1:0", "--state", str(self.desk), *secure]
        self.coordinator = self._run("coordinator", *argv)
        found: list[str] = []

        def ready() -> bool:
            assert self.coordinator.poll() is None, self.words("coordinator")
            found[:] = re.findall(r"Serving (https?://\S+)/v1", self.words("coordinator"))
            return bool(found)

        await until(ready, "the coordinator serves")
        return found[0]

    def write_config(self) -> None:
        """worker.toml, with the proxy as the coordinator."""
        self.far.mkdir()
        self.effects.touch(0o666)
        self.effects.chmod(0o666)
        argv = ["/bin/sh", "-c", EFFECT, "sh", "{folder}", "{mark}", str(self.effects)]
        authority = f'tls_ca = "{self.tls[0]}"\n' if self.tls else ""
        (self.far / "worker.toml").write_text(
            f'[coordinator]\nurl = "{"wss" if self.tls else "ws"}://127.0.0.1:{self.proxy.port}"\n'
            f'token_file = "{self.desk / "worker.token"}"\n{authority}'
            f'[worker]\nname = "far"\nstate_dir = "state"\n'
            f"[engines.command]\nwrite = [{json.dumps(str(self.effects))}]\n"
            '[[models]]\nname = "synthetic"\nengine = "synthetic"\noptions = { slots = 4, delay_ms = 2 }\n'
            f'[[models]]\nname = "effect"\nengine = "command"\noptions = {{ slots = 2, argv = {json.dumps(argv)} }}\n'
        )

    def start_worker(self) -> None:
        """Start it, without waiting."""
        self.worker = self._run("supervisor", "supervisor", "run", "--config", str(self.far / "worker.toml"))

    def kill_worker(self) -> None:
        """SIGKILL, and again from the beginning."""
        assert self.worker is not None
        assert self.worker.poll() is None, f"ended by itself\n{self.words('supervisor')[-4000:]}"
        self.worker.kill()
        self.worker.wait(PATIENCE_S)
        self.kills += 1
        self.start_worker()

    async def served(self) -> None:
        """Wait until both models are announced."""
        await until(lambda: self.worker is not None, "there is a worker")
        with trio.fail_after(PATIENCE_S):
            while True:
                assert self.worker is not None
                assert self.worker.poll() is None, self.words("supervisor")[-4000:]
                listed = (await self.client.get("/v1/models")).json()["data"]
                if {model["id"] for model in listed} >= {"synthetic", "effect"}:
                    return
                await trio.sleep(LOOK_S)

    # ---- clients

    async def ask_all(self, asks: Sequence[Ask]) -> None:
        """Submit all, `CLIENTS` at once, and read every stream to its end."""
        waiting = list(asks)

        async def one() -> None:
            while waiting:
                await self._ask(waiting.pop(0))

        async with trio.open_nursery() as nursery:
            for _ in range(CLIENTS):
                nursery.start_soon(one)

    async def _ask(self, ask: Ask) -> None:
        if ask.kind == "chat":
            await self._stream(ask)
            return
        answer = await self.client.post("/v1/jobs", json=ask.body | {"wait_for_worker": True})
        assert answer.status_code in (200, 202), answer.text
        self.jobs[answer.json()["id"]] = ask

    async def _stream(self, ask: Ask) -> None:
        """A chat is refused while no worker serves the model; that is not accepted, and asked again."""
        with trio.fail_after(STREAM_S):
            while True:
                async with self.client.stream("POST", "/v1/chat/completions", json=ask.body) as answer:
                    job = answer.headers.get("x-bulkhead-job", "")
                    if job:
                        self.jobs[job] = ask
                        self.streams[job] = await _read(answer)
                        return
                    code = (await answer.aread(), answer.json()["error"]["code"])[1]
                    assert code in ("model_not_found", "no_worker", "overloaded"), answer.text
                await trio.sleep(LOOK_S)

    def quiet(self) -> bool:
        """Whether every accepted job has ended."""
        return all(row["state"] in ENDS for row in self.rows().values())

    def ended(self) -> int:
        """How many jobs have."""
        return sum(row["state"] in ENDS for row in self.rows().values())

    async def all_ended(self, patience_s: float) -> None:
        """Wait for the end of every accepted job."""
        with trio.move_on_after(patience_s):
            await looked(self.quiet)
            return
        late = {id_: row["state"] for id_, row in self.rows().items() if row["state"] not in ENDS}
        raise AssertionError(f"never ended: {late}\n{self.words('supervisor')[-3000:]}")

    async def all_acknowledged(self, patience_s: float = PATIENCE_S) -> None:
        """Wait until the worker keeps nothing any more."""
        await until(lambda: not self.kept(), f"the worker keeps nothing: {self.kept()}", patience_s)

    # ---- looking

    def rows(self) -> dict[str, dict[str, Any]]:
        """The coordinator's own table."""
        with contextlib.closing(sqlite3.connect(f"file:{self.desk / 'coordinator.sqlite'}?mode=ro", uri=True)) as base:
            base.row_factory = sqlite3.Row
            found = base.execute("SELECT id, state, attempt, tries, streamed, fault FROM jobs")
            return {row["id"]: dict(row) for row in found}

    def kept(self) -> list[str]:
        """What the worker's outbox holds. (Its table is locked by it.)"""
        folder = self.far / "state/outbox"
        return [path.name for path in folder.iterdir()] if folder.exists() else []

    async def ends_counted(self) -> float:
        """How many ends of jobs the coordinator has announced; right as long as it was not restarted."""
        text = (await self.client.get("/metrics")).text
        return sum(float(number) for number in re.findall(r"^\w+_jobs_total\{[^}]*\} (\S+)$", text, re.MULTILINE))

    # ---- the judge

    async def judge(self, *, killed: bool = False) -> dict[str, int]:
        """Check every invariant; returns what to report. AssertionError names the job."""
        assert self.worker is not None
        assert self.worker.poll() is None, f"it ended by itself\n{self.words('supervisor')[-4000:]}"
        assert "Traceback" not in self.words("supervisor"), self.words("supervisor")[-4000:]
        rows, oracle = self.rows(), Oracle()
        assert rows.keys() == self.jobs.keys()
        counted = await self.ends_counted()
        with trio.move_on_after(PATIENCE_S):  # a row ends a moment before its end is counted
            while counted < len(rows):
                await trio.sleep(LOOK_S)
                counted = await self.ends_counted()
        assert counted == len(rows), f"{counted} ends of {len(rows)} jobs"
        for id_, ask in self.jobs.items():
            row = rows[id_]
            assert row["state"] in ENDS, (id_, row)
            if ask.kind == "chat":
                _judge_stream(id_, ask, self.streams[id_], row)
            elif row["state"] == "succeeded" and ask.kind != "command":
                await self._judge_result(id_, ask, await trio.to_thread.run_sync(oracle.expected, ask))
        self._judge_effects(rows)
        lost = [id_ for id_, row in rows.items() if row["state"] != "succeeded"]
        for id_ in lost:
            row = rows[id_]
            # A stream that had begun is declared broken when its worker was away for too long; nothing else is lost,
            # but for a job that was under way in three lives that were killed.
            code = msgspec.msgpack.decode(row["fault"], type=Fault).code
            broken = row["streamed"] or (killed and row["tries"] >= MOST_TRIES)
            excused = code == "worker_lost" and broken
            assert excused, f"{id_} was lost: {self.jobs[id_].kind} {code} {row}"
        again = sum(row["tries"] > 1 for row in rows.values())
        return {"jobs": len(rows), "failed": len(lost), "tried again": again, "kills": self.kills}

    async def _judge_result(self, id_: str, ask: Ask, expected: Expected) -> None:
        answer = await self.client.get(f"/v1/jobs/{id_}/result")
        assert answer.status_code == 200, (id_, answer.text)
        assert decoded(ask.kind, answer.content) == expected.body, id_
        files = (await self.client.get(f"/v1/jobs/{id_}")).json()["files"]
        assert {file["name"] for file in files} == expected.files.keys(), id_
        for file in files:
            assert (await self.client.get(file["url"])).content == expected.files[file["name"]], (id_, file)

    def _judge_effects(self, rows: dict[str, dict[str, Any]]) -> None:
        """No attempt ran twice, none ran that was not made, and what succeeded has run."""
        ran = self.effects.read_text().split("\n")[:-1]
        assert len(ran) == len(set(ran)), "an attempt ran twice"
        by_job: dict[str, list[str]] = {}
        for line in ran:
            attempt, mark = line.split(" ")
            job, _, _number = attempt.rpartition(".")
            assert self.jobs[job].body["params"]["args"]["mark"] == mark
            by_job.setdefault(job, []).append(attempt)
        for job, row in rows.items():
            if self.jobs[job].kind == "command":
                assert len(by_job.get(job, ())) <= row["attempt"], (job, row, by_job[job])
                assert row["state"] != "succeeded" or job in by_job, job


def _judge_stream(id_: str, ask: Ask, seen: Seen, row: dict[str, Any]) -> None:
    if seen.end == "done":
        assert (seen.said, row["state"]) == (ask.text, "succeeded"), (id_, seen, row)
        return
    assert seen.end != "torn", f"{id_}: a stream ended without an end: {seen} {row}"
    assert ask.text.startswith(seen.said), f"{id_}: pieces are missing or came twice: {seen}"
    assert row["state"] == "failed", (id_, seen, row)


async def _read(answer: httpx.Response) -> Seen:
    said, end = "", "torn"
    if answer.status_code != 200:
        return Seen("", (await answer.aread(), answer.json()["error"]["code"])[1])
    async for line in answer.aiter_lines():
        if line == "data: [DONE]":
            end = "done"
        elif line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                end = event["error"]["code"]
            for choice in event.get("choices", ()):
                said += choice["delta"].get("content") or ""
    return Seen(said, end)


async def looked(true: Callable[[], Any]) -> None:
    """Look again and again: what other programs do sets no event here."""
    while True:
        if true():
            return
        await trio.sleep(LOOK_S)


async def until(true: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> None:
    """Look again and again until it is true."""
    with trio.move_on_after(patience_s):
        await looked(true)
        return
    raise AssertionError(f"not within {patience_s:g} s: {what}")


@contextlib.asynccontextmanager
async def open_world(
    folder: Path, seed: int, odds: Odds, *, tls: tuple[Path, Path] | None = None
) -> AsyncIterator[World]:
    """Both programs, with models announced over a calm proxy that then gets its odds."""
    world = World(folder, tls)
    try:
        async with trio.open_nursery() as nursery:
            url = await world.start_coordinator()
            world.proxy = Proxy(int(url.rpartition(":")[2]), seed, CALM, opaque=tls is not None)
            await nursery.start(world.proxy.run)
            world.write_config()
            headers = {"Authorization": f"Bearer {(world.desk / 'client.key').read_text().strip()}"}
            limits = httpx.Limits(max_connections=CLIENTS + 4)
            async with httpx.AsyncClient(
                base_url=url,
                headers=headers,
                timeout=STREAM_S,
                limits=limits,
                trust_env=False,
                verify=_trusting(tls[0]) if tls else False,
            ) as world.client:
                world.start_worker()
                await world.served()
                world.proxy.odds = odds
                yield world
            nursery.cancel_scope.cancel()
    finally:
        if world.worker is not None:
            world.worker.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                world.worker.wait(10)
            world.worker.kill()
            world.worker.wait(PATIENCE_S)
        world.coordinator.kill()
        world.coordinator.wait(PATIENCE_S)


def _trusting(certificate: Path) -> Any:
    import ssl

    return ssl.create_default_context(cafile=str(certificate))
