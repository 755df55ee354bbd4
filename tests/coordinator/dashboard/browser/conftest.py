"""A running coordinator with simulated workers, and a real Chromium to look at its dashboard."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from coordinator.testing import Running, running
from coordinator.testing_link import RawWorker
from protocol import link_wire as wire

CHROMIUM = os.environ.get("BULKHEAD_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome") or ""
REASON = "no Chromium was found; on Debian: apt install chromium, elsewhere set BULKHEAD_CHROMIUM to its path"
PATIENCE_MS = 60_000
PATIENCE_S = PATIENCE_MS / 1000
ARGUMENTS = [
    "--no-sandbox",  # the tests may run as root in a container, where Chromium's sandbox cannot
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
GIB = 2**30
# A line about what went well is gone after 8 s, in which a test on a slow machine may not have come to look for it.
NOTICES_STAY = """
const later = window.setTimeout;
window.setTimeout = (act, pause, ...rest) => later(act, pause === 8000 ? 600000 : pause, ...rest);
"""
BEAT_S = 3.0
EVIL = "<img src=x onerror=alert(1)>"
VERDICTS = {"landlock": "verified", "seccomp": "verified", "net": "unavailable(EPERM)"}


class Box:
    """A simulated worker: a real session, read by a thread, of which a test sees what it was told."""

    def __init__(self, served: Running, name: str, models: tuple[wire.ModelOffer, ...], **more: Any) -> None:
        self.raw = RawWorker(
            int(served.url.rpartition(":")[2]), name, more.pop("token", served.worker_token), judge=False
        )
        self.raw.hello(*models, **more)
        self.told: list[Any] = []
        self.offers: list[Any] = []
        self.closed = False
        self.gpus: tuple[wire.GpuState, ...] = ()
        self.changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        beat = 1
        with contextlib.suppress(Exception):  # however it ended: the test looks whether it should have
            while True:
                try:
                    said = self.raw.receive(BEAT_S)
                except TimeoutError:
                    beat += 1
                    self.raw.send(wire.Heartbeat(n=beat, gpus=self.gpus))
                    continue
                if isinstance(said.body, wire.Offer):
                    self.raw.send(wire.Accept(), said.job, said.attempt)
                    self.raw.send(wire.Started(), said.job, said.attempt)
                with self.changed:
                    (self.offers if isinstance(said.body, wire.Offer) else self.told).append(said)
                    self.changed.notify_all()
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def heard(self, kind: type[Any]) -> Any:
        """What it was told of this kind, once it was."""
        found: list[Any] = []

        def there() -> bool:
            found[:] = [said.body for said in self.told if isinstance(said.body, kind)]
            return bool(found)

        with self.changed:
            assert self.changed.wait_for(there, PATIENCE_S), self.told
        return found[-1]

    def has_offers(self, number: int) -> list[Any]:
        """Its offers, once there are so many."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.offers) >= number, PATIENCE_S)
        return self.offers

    def until_closed(self) -> None:
        """Wait until its session has ended."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.closed, PATIENCE_S)

    def leave(self) -> None:
        """End the session."""
        self.raw.drop()
        self._thread.join(PATIENCE_S)


class Site:
    """What a test of the page needs."""

    def __init__(self, served: Running, stack: ExitStack) -> None:
        self.served, self.url, self._stack = served, served.url, stack
        self.key = served.coordinator.keys.create("admin", name="boss")
        self.admin = stack.enter_context(
            httpx.Client(base_url=served.url, headers={"authorization": f"Bearer {self.key}"}, timeout=PATIENCE_S)
        )
        self.client = stack.enter_context(httpx.Client(base_url=served.url, headers=served.headers, timeout=PATIENCE_S))

    def box(self, name: str, *models: str, **more: Any) -> Box:
        """Connect a worker with two GPUs that serves these models."""
        offers = tuple(
            wire.ModelOffer(
                name=model,
                kinds=("llm",),
                engine="fake",
                slots=more.get("slots", 2),
                resident=True,
                device="cuda",
                vram_bytes=5 * GIB,
                sandbox=VERDICTS,
            )
            for model in models
        )
        gpus = tuple(wire.Gpu(f"GPU-{name}-{n}", f"Card {n}", 24 * GIB, 20 * GIB) for n in range(2))
        more.pop("slots", None)
        capabilities = {"machine": "linux x86_64", "version": "1.2", "gpus": gpus, **more}
        box = Box(self.served, name, offers, **capabilities)
        self._stack.callback(box.leave)
        box.gpus = tuple(wire.GpuState(gpu.uuid, 7 * GIB, 0.5, 61.0 + n, 180.0) for n, gpu in enumerate(gpus))
        box.raw.send(wire.Heartbeat(n=1, gpus=box.gpus))
        box.heard(wire.HeartbeatAck)
        return box

    def submit(self, model: str, **more: Any) -> str:
        """Submit a job that waits for nobody's answer; its id."""
        body = {"kind": "llm", "model": model, "params": {"prompt": "hi"}, "wait_for_worker": True, **more}
        answer = self.client.post("/v1/jobs", json=body)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def job(self, job: str) -> dict[str, Any]:
        """A job as its owner sees it."""
        found: dict[str, Any] = self.client.get(f"/v1/jobs/{job}").json()
        return found


@pytest.fixture(scope="session")
def axe() -> str:
    """The source of axe-core, which finds what keeps people from using a page."""
    if path := os.environ.get("BULKHEAD_AXE"):
        return Path(path).read_text()
    found = importlib.util.find_spec("axe_playwright_python")
    if found is None or found.origin is None:
        pytest.skip("axe-core was not found: install axe-playwright-python, or set BULKHEAD_AXE to axe.min.js")
    return Path(found.origin).with_name("axe.min.js").read_text()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """The browser, for all tests of a module."""
    sync_api: Any = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip(REASON)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS, timeout=5 * PATIENCE_MS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory, chromium: Any) -> Iterator[Running]:
    """A coordinator for the module."""
    with running(tmp_path_factory.mktemp("dashboard")) as served:
        yield served


@pytest.fixture
def site(coordinator: Running) -> Iterator[Site]:
    """Workers that a test connects leave with it."""
    with ExitStack() as stack:
        yield Site(coordinator, stack)


@pytest.fixture
def tab(chromium: Any) -> Iterator[Any]:
    """A tab of a browser that knows nothing yet; what went wrong in it is in `problems`."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light", locale="en-US")
    context.set_default_timeout(PATIENCE_MS)
    context.add_init_script(NOTICES_STAY)
    page = context.new_page()
    page.problems = []
    page.on("console", lambda said: page.problems.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    yield page
    context.close()


@pytest.fixture
def signed(site: Site, tab: Any) -> Any:
    """A tab that has logged in."""
    tab.goto(site.url)
    tab.get_by_label("Admin key").fill(site.key)
    tab.get_by_role("button", name="Open the dashboard").click()
    tab.get_by_role("heading", name="serving").wait_for()
    return tab
