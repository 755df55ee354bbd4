"""The owner's machine in one scene: a real supervisor, real engines, a simulated GPU. Started by scripts/scene.

Two models of 5 GiB and a small one share a GPU of 8 GiB and take turns. Twice a game starts: the screen is full, and
GPU memory goes to somebody else. The worker steps aside and says why, and comes back warm with the models that it had.
The second game comes in the middle of a job and while others wait; all of them are done in the end.

All the while the status is asked again and again over the owner's socket. Whenever nothing runs, it has to say why, for
the worker and for the GPU. Exit code 0 only when the story went as it is told.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx

from supervisor.control.client import ask
from supervisor.errors import SupervisorError

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
GPU = "GPU-sim-0"
GAME = "Half-Life 3 fills the screen"
CHAT, DRAW, EARS = "synthetic-chat", "synthetic-draw", "synthetic-ears"
READY_S = 240.0
PATIENCE_S = 120.0
LOOK_S = 0.05
# Words of the long job: 12 s. It has to run still when the worker has noticed the game, which takes it 2 s.
LONG = 600

CONFIG = """
[coordinator]
listen = "127.0.0.1:0"
[worker]
name = "scene"
state_dir = "state"
[limits]
drain_s = 10
vram_margin_gb = 0.25
[holds.presence]
mode = "abort"       # a game gets the GPU at once
idle_s = 60
enter_s = 0
[holds.foreign_vram]
mode = "unload"
enter_gb = 2
leave_gb = 1
enter_s = 2
leave_s = 0
[holds.battery]
mode = "off"         # the scene is the same on a laptop
[holds.disk]
mode = "off"
"""
# name, GiB, milliseconds per word
SERVED = ((CHAT, 5, 20), (DRAW, 5, 1), (EARS, 1, 1))


class Wrong(Exception):
    """The story does not go as it is told."""


# ---- the machine


class Machine:
    """The files that stand for GPU and owner; each is replaced as a whole."""

    def __init__(self, folder: Path) -> None:
        self.gpus, self.person = folder / "gpus.json", folder / "person.json"
        self.others_hold(0)
        self.nobody()

    def others_hold(self, gib: float) -> None:
        """So much of the GPU's 8 GiB is somebody else's."""
        gpu = {"uuid": GPU, "memory_total_bytes": 8 * GIB, "processes": []}
        if gib:
            gpu["processes"] = [{"pid": 1, "kind": "graphics", "bytes": int(gib * GIB)}]
        _replace(self.gpus, {"gpus": [gpu]})

    def nobody(self) -> None:
        """The last input was a quarter of an hour ago."""
        _replace(self.person, {"idle_s": 900})

    def plays(self) -> None:
        """Somebody plays."""
        _replace(self.person, {"idle_s": 0, "fullscreen": GAME})


def _replace(path: Path, value: object) -> None:
    partial = path.with_suffix(".new")
    partial.write_text(json.dumps(value))
    partial.replace(path)


def config() -> str:
    """worker.toml."""
    models = [
        f'[[models]]\nname = "{name}"\nengine = "synthetic"\ndevice = "auto"\ngpus = ["{GPU}"]\nvram_gb = {gib}\n'
        f'options = {{ gpu = "{GPU}", vram_bytes = {gib * GIB}, slots = 1, delay_ms = {delay} }}\n'
        for name, gib, delay in SERVED
    ]
    return "\n".join([CONFIG, *models])


@contextlib.contextmanager
def worker(folder: Path, machine: Machine) -> Iterator[Path]:
    """Run the supervisor; yields its control socket. Ends it as a service manager would."""
    path = folder / "worker.toml"
    path.write_text(config())
    log = folder / "log"
    environ = {
        **os.environ,
        "BULKHEAD_SIMULATED_GPUS": str(machine.gpus),
        "BULKHEAD_SIMULATED_PRESENCE": str(machine.person),
    }
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "supervisor", "run", "--config", str(path)],
            stdout=out,
            stderr=out,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=environ,
        )
    try:
        yield folder / "state" / "control.sock"
        if process.poll() is not None:
            raise Wrong(f"the supervisor ended with exit code {process.returncode}")
    except (Wrong, httpx.HTTPError, SupervisorError, OSError) as error:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
        raise Wrong(f"{error}\nThe last words of the supervisor:\n{tail}") from error
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# ---- who watches


class Watcher(threading.Thread):
    """Asks for the status again and again, tells every change, and notes each moment without a reason.

    Args:
        tell: called with each status that differs from the one before it.

    Attributes:
        count: how often it was asked.
        wrong: sentences about statuses that were not right.
    """

    def __init__(self, socket: Path, tell: Callable[[Mapping[str, Any]], None]) -> None:
        super().__init__(daemon=True)
        self._socket, self._tell = socket, tell
        self._over = threading.Event()
        self._before: object = None
        self._news = threading.Condition()
        self._latest: Mapping[str, Any] = {}
        self.count = 0
        self.wrong: list[str] = []

    def run(self) -> None:
        """Until `stop`."""
        while not self._over.wait(LOOK_S):
            try:
                self._judge(ask(self._socket, "GET", "/v1/status", patience_s=PATIENCE_S))
            except (SupervisorError, OSError) as error:
                if not self._over.is_set():
                    self.wrong.append(f"the status was not answered: {error}")

    def stop(self) -> None:
        """No more questions."""
        self._over.set()
        self.join(PATIENCE_S)

    def wait(self, right: Callable[[Mapping[str, Any]], bool], what: str) -> Mapping[str, Any]:
        """The first status that was asked for from now on, has been told, and is right. Raises Wrong."""
        end = time.monotonic() + PATIENCE_S
        with self._news:
            least = self.count + 2  # the next one may have been asked for before
            while self.count < least or not right(self._latest):
                left = end - time.monotonic()
                if left <= 0 or not self._news.wait(left):
                    said = short(self._latest) if self._latest else "nothing"
                    raise Wrong(f"not within {PATIENCE_S:g} s: {what}; the status says {said}")
            return self._latest

    def _judge(self, seen: Mapping[str, Any]) -> None:
        (gpu,) = seen["gpus"] or [{"why": "", "uuid": GPU, "free_bytes": None}]
        runs = any(model["running"] for model in seen["models"])
        waits = any(model["queued"] for model in seen["models"])
        told = short(seen)
        if not runs and not (seen["why"] and (gpu["why"] or not seen["gpus"])):
            self.wrong.append(f"nothing runs and nobody says why: {told}")
        if waits and not runs and "no jobs" in seen["why"] + gpu["why"]:
            self.wrong.append(f"jobs wait, and it says that there are none: {told}")
        if not seen["holds"] and "Paused" in seen["why"] + gpu["why"]:
            self.wrong.append(f"nothing holds, and it says that it is paused: {told}")
        if seen["holds"] and seen["state"] not in ("paused", "draining") and not _only_cordons(seen):
            self.wrong.append(f"it is held, and its state is {seen['state']}: {told}")
        if told != self._before:
            self._before = told
            self._tell(seen)
        with self._news:
            self.count += 1
            self._latest = seen
            self._news.notify_all()


def _only_cordons(seen: Mapping[str, Any]) -> bool:
    return all(hold["gpu"] or hold["kind"] for hold in seen["holds"])


def short(seen: Mapping[str, Any]) -> dict[str, Any]:
    """What a person would notice of a status."""
    return {
        "state": seen["state"],
        "why": seen["why"],
        "gpu": seen["gpus"][0]["why"] if seen["gpus"] else seen["gpu_reason"],
        "free_gib": free_gib(seen),
        "models": {model["name"]: model["state"] for model in seen["models"]},
        "running": sum(model["running"] for model in seen["models"]),
        "holds": [f"{hold['source']}: {hold['reason']}" for hold in seen["holds"]],
    }


def free_gib(seen: Mapping[str, Any]) -> float:
    """Free memory of the GPU; -1 when it is not known."""
    free = seen["gpus"][0]["free_bytes"] if seen["gpus"] else None
    return -1.0 if free is None else round(free / GIB, 1)


# ---- who tells


class Teller:
    """Prints the story; the lines of the watcher come from another thread."""

    def __init__(self, as_json: bool) -> None:
        self._json, self._began = as_json, time.monotonic()
        self._lock = threading.Lock()

    def story(self, text: str) -> None:
        """What happens."""
        self._line({"story": text}, f"\n{text}")

    def status(self, seen: Mapping[str, Any]) -> None:
        """What the status says about it."""
        told = short(seen)
        loaded = ", ".join(f"{name} {state}" for name, state in told["models"].items() if state != "cold")
        text = f"{told['state']:8} {told['why'] or 'Works.'}"
        text += f"\n{'':19}GPU: {told['free_gib']:g} GiB free; {loaded or 'nothing is loaded'}"
        if told["gpu"] not in ("", told["why"]):
            text += f"\n{'':19}GPU: {told['gpu']}"
        self._line({"status": told}, f"  {self._at():6.1f} s  {text}")

    def result(self, fields: Mapping[str, Any], text: str) -> None:
        """How it went."""
        self._line(fields, f"\n{text}")

    def _at(self) -> float:
        return round(time.monotonic() - self._began, 2)

    def _line(self, fields: Mapping[str, Any], text: str) -> None:
        with self._lock:
            print(json.dumps({"at": self._at(), **fields}) if self._json else text, flush=True)


# ---- the story


class Scene:
    """See the module.

    Attributes:
        facts: what was measured.
    """

    def __init__(self, watcher: Watcher, machine: Machine, http: httpx.Client, teller: Teller) -> None:
        self._until, self._machine, self._http, self._teller = watcher.wait, machine, http, teller
        self.facts: dict[str, Any] = {}

    def play(self) -> None:
        """From beginning to end. Raises Wrong."""
        self.take_turns()
        self.game_while_idle()
        self.game_while_working()

    def take_turns(self) -> None:
        """Two that do not fit together, and one that fits beside each."""
        self._teller.story("The small model and the first of the large ones are asked: both fit.")
        self._chat(EARS)
        self._chat(CHAT)
        self._until(lambda seen: self._loaded(seen) == {EARS, CHAT}, "both are loaded")
        self._teller.story("The other large one is asked: its memory is the first one's, which ends.")
        self._chat(DRAW)
        self._until(lambda seen: DRAW in self._loaded(seen) and CHAT not in self._loaded(seen), "they have swapped")
        self._teller.story("And back again.")
        self._chat(CHAT)
        self._chat(EARS)
        self._until(lambda seen: self._loaded(seen) == {EARS, CHAT}, "they have swapped again")
        self._until(lambda seen: free_gib(seen) == 2, "the GPU shows it")

    def game_while_idle(self) -> None:
        """Nobody asks for anything: what comes back afterwards is warm because it was loaded before."""
        before = self._pids(self._until(lambda seen: self._loaded(seen) == {EARS, CHAT}, "both are loaded"))
        self._teller.story("The owner starts a game.")
        self._step_aside("idle_game_free_s")
        self._teller.story("The game takes the GPU's memory.")
        self._machine.others_hold(6)
        self._until(lambda seen: free_gib(seen) == 2 and len(seen["holds"]) == 2, "the worker has seen the game on it")
        self._teller.story("The game ends. Nobody has asked for a model.")
        began = time.monotonic()
        self._machine.nobody()
        self._machine.others_hold(0)
        warm = self._until(
            lambda seen: not seen["holds"] and self._loaded(seen) == {EARS, CHAT}, "the same models are back"
        )
        self.facts["idle_game_warm_s"] = round(time.monotonic() - began, 2)
        after = self._pids(warm)
        if before.keys() != after.keys() or set(before.values()) & set(after.values()):
            raise Wrong(f"the models were to leave and come back: {before} before, {after} after")

    def game_while_working(self) -> None:
        """A job is in the middle, others come while the game is on; all are done in the end."""
        self._teller.story("A long job begins.")
        jobs = [self._submit(CHAT, LONG)]
        self._until(lambda seen: self._model(seen, CHAT)["running"] == 1, "it runs")
        self._teller.story("The owner starts the game again: it gets the GPU at once, and the job goes back.")
        self._step_aside("working_game_free_s")
        self._machine.others_hold(6)
        self._teller.story("Jobs for both large models come in while the game is on: they wait.")
        jobs += [self._submit(DRAW, 3), self._submit(CHAT, 3), self._submit(EARS, 3)]
        self._until(lambda seen: len(seen["holds"]) == 2 and free_gib(seen) == 2, "the worker has seen the game on it")
        for job in jobs:
            if (state := self._job(job)["state"]) != "queued":
                raise Wrong(f"{job} is {state} while the game is on")
        self._teller.story("The game ends. The worker comes back, and does all of it.")
        self._machine.others_hold(0)
        self._machine.nobody()
        for job in jobs:
            found = self._ended(job)
            if found["state"] != "succeeded":
                raise Wrong(f"{job} is {found['state']}: {found}")
        self.facts["jobs"] = len(jobs)
        self._until(lambda seen: seen["state"] == "idle" and not seen["holds"], "it is idle again")

    def _step_aside(self, fact: str) -> None:
        began = time.monotonic()
        self._machine.plays()
        seen = self._until(
            lambda seen: GAME in seen["why"] and not self._loaded(seen) and free_gib(seen) == 8,
            "the worker has stepped aside",
        )
        self.facts[fact] = round(time.monotonic() - began, 2)
        if GAME not in seen["gpus"][0]["why"]:
            raise Wrong(f"the GPU does not say why it is idle: {seen['gpus'][0]['why']!r}")

    # ---- small parts

    def _model(self, seen: Mapping[str, Any], name: str) -> Mapping[str, Any]:
        return next(model for model in seen["models"] if model["name"] == name)

    def _loaded(self, seen: Mapping[str, Any]) -> set[str]:
        return {model["name"] for model in seen["models"] if model["state"] in ("ready", "busy")}

    def _pids(self, seen: Mapping[str, Any]) -> dict[str, int]:
        return {model["name"]: model["pid"] for model in seen["models"] if model["pid"]}

    def _chat(self, model: str) -> None:
        body = {"model": model, "messages": [{"role": "user", "content": "well said"}]}
        answer = self._http.post("/v1/chat/completions", json=body)
        if answer.status_code != 200:
            raise Wrong(f"{model} answered {answer.status_code}: {answer.text}")

    def _submit(self, model: str, words: int) -> str:
        text = " ".join(["word"] * words)
        body = {"kind": "llm", "model": model, "params": {"messages": [{"role": "user", "content": text}]}}
        return str(self._http.post("/v1/jobs", json=body).raise_for_status().json()["id"])

    def _job(self, id_: str) -> dict[str, Any]:
        found: dict[str, Any] = self._http.get(f"/v1/jobs/{id_}").raise_for_status().json()
        return found

    def _ended(self, id_: str) -> dict[str, Any]:
        end = time.monotonic() + 2 * PATIENCE_S
        while (found := self._job(id_))["state"] in ("queued", "running") and time.monotonic() < end:
            time.sleep(LOOK_S)
        return found


def open_http(folder: Path) -> httpx.Client:
    """A client of the coordinator, once all models are announced. Raises Wrong."""
    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        with contextlib.suppress(OSError, ValueError, KeyError, httpx.HTTPError):
            told = json.loads((folder / "state" / "endpoint.json").read_text())
            key = Path(told["client_key_file"]).read_text().strip()
            http = httpx.Client(
                base_url=told["url"],
                headers={"Authorization": f"Bearer {key}"},
                timeout=PATIENCE_S,
                trust_env=False,
            )
            if len(http.get("/v1/models").json()["data"]) == len(SERVED):
                return http
            http.close()
        time.sleep(LOOK_S)
    raise Wrong(f"the models were not announced within {READY_S:g} s")


def play(folder: Path, teller: Teller) -> bool:
    """Set the stage and play; True when it went as told."""
    machine = Machine(folder)
    teller.story("The worker starts; nobody is at the machine.")
    facts: dict[str, Any] = {}
    wrong: list[str] = []
    watcher: Watcher | None = None
    try:
        with worker(folder, machine) as socket, contextlib.closing(open_http(folder)) as http:
            watcher = Watcher(socket, teller.status)
            watcher.start()
            scene = Scene(watcher, machine, http, teller)
            facts = scene.facts
            try:
                scene.play()
            finally:
                watcher.stop()
    except Wrong as error:
        wrong.append(str(error))
    if watcher is not None:
        wrong = list(dict.fromkeys([*watcher.wrong, *wrong]))
        facts["samples"] = watcher.count
    text = "\n".join(wrong) or ", ".join(f"{name} {value}" for name, value in facts.items())
    teller.result({"ok": not wrong, "wrong": wrong, **facts}, f"{'WRONG' if wrong else 'As told'}: {text}")
    return not wrong


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="scripts/scene", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="for programs: one JSON object per line")
    parser.add_argument("--keep", action="store_true", help="leave the folder with worker.toml, log and state")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the supervisor is ended all the same
    folder = Path(tempfile.mkdtemp(prefix="scene-"))  # short: the control socket's path must be below 108 bytes
    try:
        return 0 if play(folder, Teller(args.json)) else 1
    finally:
        if args.keep:
            print(f"Its folder: {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
