"""SIGKILL of a supervisor with a nasty family below it: nothing of it is left, and the next start is clean.

The families are made by engines/synthetic/misbehave.py: children in sessions of their own, double-forked daemons, an
engine that holds the interpreter's lock in C, one that stopped itself, a fork storm. Moment, family and delay follow
from the seed. `scripts/soak` runs more of them: BULKHEAD_ATTACK_SEEDS is how many, BULKHEAD_ATTACK_SEED the first.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

FIRST_SEED = int(os.environ.get("BULKHEAD_ATTACK_SEED", "1"))
SEEDS = range(FIRST_SEED, FIRST_SEED + int(os.environ.get("BULKHEAD_ATTACK_SEEDS", "20")))
SHARED_MEMORY = Path("/dev/shm")
LINGERING = 2  # what the two first misdeeds of a family leave behind

# One model for each phase of an engine's life, so that all can be caught in their phase at once.
MODELS = """
[engines.odd]
module = "engines.synthetic.misbehave"
[engines.late]
module = "engines.synthetic.misbehave"
env = {{ MISBEHAVE_START = "hang", MISBEHAVE_SWITCH = "{switch}" }}
write = ["{switch}"]
[[models]]
name = "synthetic"
engine = "synthetic"
[[models]]
name = "synthetic-odd"
engine = "odd"
kinds = ["llm"]
options = {{ slots = 16 }}
[[models]]
name = "synthetic-late"
engine = "late"
kinds = ["llm"]
[[models]]
name = "synthetic-stall"
engine = "odd"
kinds = ["llm"]
options = {{ load = "stall", switch = "{switch}" }}
"""
NAMES = frozenset({"synthetic", "synthetic-odd", "synthetic-late", "synthetic-stall"})

MOMENTS = ("boot", "start", "load", "run", "stream", "storm", "idle", "drain")
# What the engine does at the moment of the kill.
POSES = ("hang", "hang-gil", "spin", "stop", "ignore-term", "deaf", "stop-parent", "close-stdin", "progress")


def ask(client: httpx.Client, rigs: Any, text: str, model: str = "synthetic-odd", **more: Any) -> threading.Thread:
    """Ask in the background; whatever comes of it is none of this test's business."""

    def call() -> None:
        with contextlib.suppress(httpx.HTTPError):
            client.post("/v1/chat/completions", json=rigs.chat(text, model, **more))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


class Scene:
    """One supervisor and what its engines were brought to.

    Args:
        rig: of rig.py.
        chance: of the seed.
    """

    def __init__(self, rig: Any, rigs: Any, chance: random.Random) -> None:
        self.rig, self.rigs, self.chance = rig, rigs, chance
        self.threads: list[threading.Thread] = []
        self.switch = rig.folder / "switch"

    def ready(self) -> httpx.Client:
        """A serving supervisor."""
        client: httpx.Client = self.rig.ready()
        return client

    def count(self) -> int:
        return len(self.rig.descendants())

    def family(self, client: httpx.Client) -> None:
        """A child in a session of its own and a daemon, both deaf to SIGTERM, below an engine that lives on."""
        said = client.post("/v1/chat/completions", json=self.rigs.chat("hello", "synthetic-odd"))
        assert said.status_code == 200, said.text
        before = self.count()
        for misdeed in ("fork", "daemon"):
            answer = client.post("/v1/chat/completions", json=self.rigs.chat(misdeed, "synthetic-odd"))
            assert answer.status_code == 200, answer.text
        self.wait(lambda: self.count() >= before + LINGERING, "its strays are there")

    def wait(self, true: Callable[[], Any], what: str) -> None:
        self.rigs.until(true, what)

    def ask(self, client: httpx.Client, text: str, model: str = "synthetic-odd", **more: Any) -> None:
        self.threads.append(ask(client, self.rigs, text, model, **more))

    def busy(self, model: str, state: str = "busy") -> bool:
        return bool(self.rig.model(model)["state"] == state)

    # ---- the moments

    def boot(self) -> None:
        """The supervisor itself has only just been started; sometimes it has probes to make, too."""
        if self.rig.process is not None and self.rig.process.poll() is None:
            assert self.rig.end() == 0, self.rig.words()[-2000:]
        if self.chance.random() < 0.5:
            (self.rig.state / "verdicts.json").unlink(missing_ok=True)
        self.rig.start()
        self.pause(1.5)

    def start(self) -> None:
        """An engine hangs before its greeting."""
        client = self.ready()
        self.switch.write_text("on")
        self.ask(client, "x", "synthetic-late")
        self.wait(lambda: self.busy("synthetic-late", "starting"), "an engine starts")
        self.pause(0.3)

    def load(self) -> None:
        """An engine hangs in its load."""
        client = self.ready()
        self.switch.write_text("on")
        self.ask(client, "x", "synthetic-stall")
        self.wait(lambda: self.busy("synthetic-stall", "loading"), "an engine loads")
        self.pause(0.3)

    def run(self) -> None:
        """Strays below an engine that is caught in one of its poses."""
        client = self.ready()
        self.family(client)
        self.ask(client, self.chance.choice(POSES))
        self.wait(lambda: self.busy("synthetic-odd"), "it runs")
        self.pause(0.3)

    def stream(self) -> None:
        """Strays below an engine in the middle of a stream."""
        client = self.ready()
        self.family(client)
        body = self.rigs.chat("deaf", "synthetic-odd", stream=True)
        lines: list[str] = []

        def read() -> None:
            with contextlib.suppress(httpx.HTTPError), client.stream("POST", "/v1/chat/completions", json=body) as got:
                lines.extend(got.iter_lines())

        self.threads.append(threading.Thread(target=read, daemon=True))
        self.threads[-1].start()
        self.wait(lambda: self.busy("synthetic-odd"), "it streams")
        self.pause(0.5)

    def storm(self) -> None:
        """A process that forks two more, which fork two more: the kill comes into the middle of it."""
        client = self.ready()
        self.family(client)
        before = self.count()
        self.ask(client, "fork-bomb:200")
        self.wait(lambda: self.count() > before + 1, "it forks")
        self.pause(0.1)

    def idle(self) -> None:
        """Nothing runs, but the strays are there; or those of an engine that died, and must be gone already."""
        client = self.ready()
        self.family(client)
        if self.chance.random() < 0.5:
            dying = psutil.Process(self.rig.model("synthetic-odd")["pid"])
            self.ask(client, "daemon:exit")
            self.wait(lambda: not self.rigs.alive([dying]), "it died")
        self.pause(0.3)

    def drain(self) -> None:
        """A drain waits for an engine that will never end."""
        client = self.ready()
        self.family(client)
        self.ask(client, self.chance.choice(POSES))
        self.wait(lambda: self.busy("synthetic-odd"), "it runs")
        self.rig.process.send_signal(signal.SIGTERM)
        self.pause(0.8)

    def pause(self, longest_s: float) -> None:
        """The delay of the attack itself; nothing is waited for."""
        time.sleep(self.chance.uniform(0, longest_s))


@pytest.fixture(scope="module")
def rig(rigs, tmp_path_factory) -> Iterator[Any]:
    """One state folder for all seeds: each starts where the last one was killed."""
    folder = tmp_path_factory.mktemp("orphans")
    switch = folder / "switch"
    switch.write_text("off")
    folder.chmod(0o711)
    switch.chmod(0o644)
    limits = "drain_s = 20\nterm_grace_s = 0.5"
    made = rigs.Rig(folder, models=MODELS.format(switch=switch), limits=limits, want=NAMES)
    yield made
    made.sweep()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_killed_supervisor_takes_its_whole_family_along(rig, rigs, seed: int):
    """One life. A failure leaves nothing for the next seed."""
    chance = random.Random(seed)
    moment = chance.choice(MOMENTS)
    print(f"seed {seed}: {moment}")  # noqa: T201  pytest shows it with a failure
    (rig.folder / "switch").write_text("off")
    scene = Scene(rig, rigs, chance)
    try:
        shared, said = set(os.listdir(SHARED_MEMORY)), len(rig.words())
        getattr(scene, moment)()
        family = {*rig.descendants(), *rigs.processes_of(rig.folder)}
        rig.kill()
        assert_gone(rig, rigs, family)
        assert_nothing_shared(rigs, shared)
        assert_clean_start(rig, rigs)
        assert "Traceback" not in rig.words()[said:]
    except BaseException:
        rig.sweep()
        raise
    finally:
        for thread in scene.threads:
            thread.join(5)


def assert_gone(rig: Any, rigs: Any, family: set[psutil.Process]) -> None:
    """Within the bound nothing of it lives: what we saw before the kill, and what was forked since."""
    killed = time.monotonic()
    rigs.until(lambda: not rigs.alive(list(family)), f"all of {family} are gone", rigs.GONE_S)
    print(f"{len(family)} processes were gone after {time.monotonic() - killed:.3f} s")  # noqa: T201
    left = rigs.GONE_S - (time.monotonic() - killed)
    rigs.until(lambda: not rigs.processes_of(rig.folder), f"{rigs.processes_of(rig.folder)} are gone", left)


def assert_nothing_shared(rigs: Any, before: set[str]) -> None:
    """Nothing new lies in shared memory; what other programs put there meanwhile goes again by itself.

    A database that tests beside this one have started is not ours.
    """

    def new() -> set[str]:
        return {name for name in set(os.listdir(SHARED_MEMORY)) - before if not name.startswith("PostgreSQL.")}

    rigs.until(lambda: not new(), "nothing is left in shared memory")


def assert_clean_start(rig: Any, rigs: Any) -> None:
    """The next life finds no scratch, takes the same place, and serves at once, the abused model too."""
    (rig.folder / "switch").write_text("off")
    began = time.monotonic()
    client = rig.ready()
    rigs.until(lambda: rig.scratch() == [], "nothing of the life before is left")
    for model in ("synthetic", "synthetic-odd"):
        answer = client.post("/v1/chat/completions", json=rigs.chat("again", model))
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"] == "again"
    took = time.monotonic() - began
    print(f"the next life answered after {took:.2f} s")  # noqa: T201
    assert took < rigs.SERVES_S
