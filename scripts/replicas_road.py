"""From one box to three replicas over PostgreSQL, with real processes. Started by scripts/replicas.

A worker with its embedded coordinator does some jobs and has one waiting. Its jobs and keys go to PostgreSQL, three
coordinators serve them, the worker joins those. One replica is killed while a stream runs; then all are replaced, one
after another, while clients go on asking. Every stream has to be whole and every job done once: exit code 0 only then.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from replicas_clients import CLIENTS, PATIENCE_S, SHORT_WORDS, Crowd, asking, client, pieces, words
from replicas_parts import CHAT, TALK, Front, Replica, Worker, Wrong, command, database, until

LONG_WORDS, LONG_HEAD = 200, 20  # 4 s; the replica is killed after the head

CONFIG = """\
config_version = 1
listen = "127.0.0.1:0"
state = {state}
drain_s = 20
[replica]
listen = "127.0.0.1:0"
secret_file = "replica.secret"
"""


class Teller:
    """Prints the story, each line with its time in seconds."""

    def __init__(self, as_json: bool) -> None:
        self._json, self._began = as_json, time.monotonic()

    def story(self, text: str, **facts: Any) -> None:
        """What happens; `facts` are for programs."""
        at = round(time.monotonic() - self._began, 1)
        print(json.dumps({"at": at, "story": text, **facts}) if self._json else f"{at:5.1f} s  {text}", flush=True)

    def plain(self, text: str) -> None:
        """For people alone."""
        if not self._json:
            print(text, flush=True)

    def end(self, wrong: str, **facts: Any) -> None:
        """How it went."""
        if self._json:
            print(json.dumps({"ok": not wrong, "wrong": wrong, **facts}), flush=True)
        elif wrong:
            print(f"\nWRONG: {wrong}", flush=True)


class Road:
    """See the module.

    Attributes:
        facts: what was measured.
    """

    def __init__(self, folder: Path, count: int, teller: Teller) -> None:
        self.folder, self.config = folder, folder / "coordinator.toml"
        self.worker = Worker(folder)
        self.facts: dict[str, Any] = {}
        self.key, self.state = "", self.worker.state / "coordinator"
        self._count, self._tell = count, teller.story
        self._jobs: list[str] = []
        self._asked = 0

    # ---- before

    def one_box(self) -> None:
        """A worker with its embedded coordinator: some jobs done, one waiting. Raises Wrong."""
        self._tell("A worker starts, with the coordinator embedded: SQLite, one process, one box.")
        self.worker.run()
        url, self.key = self.worker.endpoint()
        with asking(url, self.key) as http:
            self.worker.announced(http)
            self._tell(f"It serves {url}/v1. Three jobs are done there.")
            for prompt in ("count to 5", "count to 7", "count to 9"):
                self._jobs.append(self._submit(http, CHAT, prompt))
            for job, last in zip(self._jobs, "579", strict=True):
                if (said := self._result(http, job)).split()[-1:] != [last]:
                    raise Wrong(f"{job} was to count to {last} and said {said!r}")
            self.worker.order("pause")
            self._jobs.append(self._submit(http, TALK, words("waiting", 5)))
            self._tell("The worker is paused, one more job comes in and waits. Then all of it is stopped.")
        if code := self.worker.end():
            raise Wrong(f"the worker ended with exit code {code}; see {self.worker.log}")

    def from_copy(self, source: Path) -> None:
        """The key and the files of a state folder that stays as it is. Raises Wrong."""
        found = [path for path in (source, source / "coordinator") if (path / "client.key").is_file()]
        if not found:
            raise Wrong(f"--from: {source} holds no client.key; give the state folder of a coordinator or a worker")
        self.state.mkdir(parents=True, mode=0o700)
        shutil.copy2(found[0] / "client.key", self.state / "client.key")
        if (found[0] / "blobs").is_dir():
            shutil.copytree(found[0] / "blobs", self.state / "blobs")
        self.key = (self.state / "client.key").read_text().strip()
        self._tell(f"Jobs and keys come from {found[0]}, which stays as it is; files and keys are used as copies.")

    # ---- the move

    def move(self, source: Path, store: str) -> None:
        """Into PostgreSQL. Raises Wrong."""
        began = time.monotonic()
        said = command("coordinator", "migrate", "--from", str(source), store=store)
        self.facts["migrate_s"] = round(time.monotonic() - began, 2)
        counts = said.splitlines()[0].removesuffix(" copied and counted on both sides.").split(", ")
        some = ", ".join(one for one in counts if not one.startswith("0 ")) or "nothing"
        self._tell(f"`coordinator migrate` into PostgreSQL: {some}; copied, and counted on both sides.")

    @contextlib.contextmanager
    def replicas(self, store: str) -> Iterator[list[Replica]]:
        """All replicas, serving; they are ended at the end."""
        self.config.write_text(CONFIG.format(state=json.dumps(str(self.state))))
        replicas = [Replica(number, self.folder, self.config, store) for number in range(self._count)]
        try:
            began = time.monotonic()
            replicas[0].serve()  # alone: whoever is first brings the tables up to date and makes the secret
            _all([threading.Thread(target=one.serve) for one in replicas[1:]])
            if not all(one.port for one in replicas):
                raise Wrong("not all replicas serve; their last words are in their logs")
            self.facts["replicas_s"] = round(time.monotonic() - began, 2)
            self._tell(f"{self._count} times `coordinator serve`, with one coordinator.toml; their secret was made.")
            yield replicas
        finally:
            _all([threading.Thread(target=one.end) for one in replicas])

    def old_key(self, replicas: list[Replica]) -> None:
        """It opens every replica, and finds the old jobs. Raises Wrong."""
        with asking(replicas[0].url, self.key) as http:
            found = http.get("/v1/jobs", params={"state": "queued", "limit": 100}).raise_for_status().json()["data"]
            self._asked += sum(job["model"] in (CHAT, TALK) for job in found)  # our worker will do them
        for replica in replicas:
            with asking(replica.url, self.key) as http:
                http.get("/v1/models").raise_for_status()
                states = [http.get(f"/v1/jobs/{job}").raise_for_status().json()["state"] for job in self._jobs]
                if states != ["succeeded"] * 3 + ["queued"] and self._jobs:
                    raise Wrong(f"replica {replica.number} says of the jobs: {states}")
        self._tell(
            "The old key opens each of them, and each knows the old jobs: three done, one waiting."
            if self._jobs
            else "The old key opens each of them."
        )

    def join(self, front: Front, store: str) -> None:
        """The worker gets a key and another address; what waited is done. Raises Wrong."""
        token = command("coordinator", "workers", "enrol", "--config", str(self.config), store=store).split()[0]
        command("supervisor", "enrol", front.url, token, "--config", str(self.worker.config))
        self.worker.run()
        with asking(front.url, self.key) as http:
            self.worker.announced(http)
            if self._jobs:
                self.worker.order("resume")
                if (said := self._result(http, self._jobs[-1])) != words("waiting", 5):
                    raise Wrong(f"the job that waited said {said!r}")
        self._tell(
            "`supervisor enrol` has pointed the worker at them"
            + (", `resume` lets it work: the job that waited is done." if self._jobs else ".")
        )

    # ---- what replicas are for

    def kill(self, replicas: list[Replica], front: Front) -> None:
        """The replica that the worker hangs on dies while a stream goes through another one. Raises Wrong."""
        until(lambda: front.worker_at >= 0, "the worker hangs on a replica")
        victim = replicas[front.worker_at]
        mine = next(one for one in replicas if one is not victim)
        text, said, longest = words("long", LONG_WORDS), "", 0.0
        with client(mine.url, self.key) as asked:
            last = 0.0
            for number, piece in enumerate(pieces(asked, text, "long")):
                now = time.monotonic()
                longest, last = max(longest, now - last) if number > LONG_HEAD else 0.0, now
                said += piece
                if number == LONG_HEAD:
                    victim.end(signal.SIGKILL)
                    self._tell(
                        f"A stream runs through replica {mine.number}. After {LONG_HEAD} words `kill -9` hits replica "
                        f"{victim.number}, the one that the worker hangs on."
                    )
        if said.split() != text.split():
            raise Wrong(f"the stream has {len(said.split())} of {LONG_WORDS} words")
        self.facts["kill_pause_s"] = round(longest, 2)
        self._tell(f"The stream went on: {LONG_WORDS} of {LONG_WORDS} words, the longest pause was {longest:.1f} s.")
        victim.serve()

    def upgrade(self, replicas: list[Replica], front: Front) -> None:
        """Each one drained and started anew, while clients ask. Raises Wrong."""
        self._tell(f"A rolling upgrade: {CLIENTS} clients ask for stream after stream, each replica is replaced.")
        with Crowd(front.url, self.key) as crowd:
            until(lambda: all(crowd.whole) or crowd.wrong, "each client has had a stream", PATIENCE_S)
            for replica in replicas:
                began = time.monotonic()
                if code := replica.end():
                    raise Wrong(f"replica {replica.number} ended its drain with exit code {code}")
                drained = time.monotonic() - began
                replica.serve()
                took = time.monotonic() - began
                self._tell(f"  replica {replica.number}: drained in {drained:.1f} s, serves again after {took:.1f} s")
        if crowd.wrong:
            raise Wrong("; ".join(crowd.wrong))
        self.facts["streams"] = sum(crowd.whole)
        self.facts["first_word_s"] = round(crowd.slowest_s, 2)
        self._asked += sum(crowd.whole)
        self._tell(
            f"{sum(crowd.whole)} streams of {SHORT_WORDS} words ran meanwhile; not a word is missing in any. "
            f"The longest wait for a first word was {crowd.slowest_s:.1f} s."
        )

    def once(self, store: str, before: dict[str, int]) -> None:
        """What the coordinators have counted is what was asked. Raises Wrong."""
        asked = self._asked + 1  # the long stream

        def counted() -> bool:
            now = self.used(store)
            return now["jobs"] - before["jobs"] >= asked

        until(counted, f"{asked} jobs are counted", PATIENCE_S)
        now = self.used(store)
        made = {name: now[name] - before[name] for name in now}
        if made != {"jobs": asked, "succeeded": asked}:
            raise Wrong(f"{asked} jobs were asked for, and counted are {made}")
        self.facts["jobs"] = asked
        self._tell(f"`coordinator usage` counts {asked} jobs since the move, as many as were asked for: each once.")

    def used(self, store: str) -> dict[str, int]:
        """How many jobs have ended, and well, as `coordinator usage` says."""
        said = json.loads(command("coordinator", "usage", "--config", str(self.config), "--json", store=store))
        return {name: sum(row[name] for row in said["data"]) for name in ("jobs", "succeeded")}

    # ---- small parts

    def _submit(self, http: httpx.Client, model: str, prompt: str) -> str:
        params = {"messages": [{"role": "user", "content": prompt}], "temperature": 0}
        body = {"kind": "llm", "model": model, "params": params}
        return str(http.post("/v1/jobs", json=body).raise_for_status().json()["id"])

    def _result(self, http: httpx.Client, job: str) -> str:
        def ended() -> str:
            state = str(http.get(f"/v1/jobs/{job}").raise_for_status().json()["state"])
            return "" if state in ("queued", "running") else state

        if (state := until(ended, f"{job} ends", PATIENCE_S)) != "succeeded":
            raise Wrong(f"{job} is {state}")
        return str(http.get(f"/v1/jobs/{job}/result").raise_for_status().json()["content"]).strip()


def _all(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


AFTERWARDS = """
For good, on this machine
  The database: sudo -u postgres createuser bulkhead; sudo -u postgres createdb -O bulkhead bulkhead
  The worker stops, then: coordinator migrate --from ~/.local/state/bulkhead --to postgres://bulkhead@/bulkhead
  One coordinator.toml, and one process per replica with --listen of its own. This run's was:

{config}
  with store = "postgres://bulkhead@/bulkhead" (or COORDINATOR_STORE, for a URL with a password) and ports of your
  choice. `state` is the embedded coordinator's folder: the client key and the files of jobs are there already.
  A load balancer in front: any that does WebSockets, adds TLS and asks /healthz. Here a small proxy of this script
  stood for it.
  The worker: `coordinator workers enrol` prints a token, `supervisor enrol https://HOST TOKEN` writes worker.toml:

{worker}
Over several machines
  Each has its own `state`, and `[replica]` with `listen` and `advertise` at an address that the others reach, and a
  copy of the same replica.secret. Files go where all of them are: `[blobs] url`, a shared folder or s3://BUCKET.
  deploy/compose has three replicas, PostgreSQL and Caddy ready-made; coordinator/README.md has the rest.
"""


def _indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())


def tables(text: str, *names: str) -> str:
    """These tables of a TOML file, as they stand there."""
    kept, out = False, []
    for line in text.splitlines():
        if line.startswith("["):
            kept = line.strip("[]") in names
        if kept and line:
            out.append(line)
    return "\n".join(out)


def play(args: argparse.Namespace, folder: Path, teller: Teller) -> dict[str, Any]:
    """From beginning to end; what was measured. Raises Wrong."""
    road = Road(folder, args.count, teller)
    with contextlib.ExitStack() as ours:
        store = ours.enter_context(database(args.store))  # first: without one there is nothing to show
        ours.callback(road.worker.end)
        if args.source:
            road.from_copy(args.source)
        else:
            road.one_box()
        road.move(args.source or road.worker.state, store)
        replicas = ours.enter_context(road.replicas(store))
        road.old_key(replicas)
        front = ours.enter_context(Front(replicas))
        ours.callback(road.worker.end)  # before the replicas, so that it says goodbye
        before = road.used(store)
        road.join(front, store)
        road.kill(replicas, front)
        road.upgrade(replicas, front)
        road.once(store, before)
        worker = tables(road.worker.config.read_text(), "coordinator")
        teller.plain(AFTERWARDS.format(config=_indented(road.config.read_text()), worker=_indented(worker)))
        if args.serve:
            stay(road, front, teller)
    return road.facts


def stay(road: Road, front: Front, teller: Teller) -> None:
    """Keep everything up until Ctrl-C or SIGTERM."""
    teller.story(f"It stays up until Ctrl-C: {front.url}/v1 with the key {road.key}; models {CHAT} and {TALK}.")
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        while True:
            signal.pause()


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="scripts/replicas", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--store", default="", metavar="URL", help="postgres://… of an empty database, which keeps what is done here"
    )
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="DIR",
        help="state folder of a worker or coordinator that is stopped",
    )
    parser.add_argument("--count", type=int, default=3, metavar="N", help="of replicas, 2 to 9; default 3")
    parser.add_argument("--serve", action="store_true", help="stay up until Ctrl-C")
    parser.add_argument("--json", action="store_true", help="for programs: one JSON object per line")
    parser.add_argument("--keep", action="store_true", help="leave the folder with configurations, logs and state")
    args = parser.parse_args()
    if not 2 <= args.count <= 9:
        parser.error("--count: Expected 2 to 9.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started is ended all the same
    folder, teller = Path(tempfile.mkdtemp(prefix="replicas-")), Teller(args.json)
    try:
        teller.end("", **play(args, folder, teller))
        return 0
    except Wrong as error:
        teller.end(str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        if args.keep:
            print(f"Its folder: {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
