"""A served page, and a real Chromium to look at it.

The supervisor's side runs on a thread of its own; the browser is driven from the test's. Nothing outside this machine
is asked for: the names of the attackers are mapped to 127.0.0.1.
"""

from __future__ import annotations

import dataclasses
import http.server
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from supervisor.control.client import ask
from supervisor.control.events import Events
from supervisor.control.jobs_seen import JobBook
from supervisor.control.login import Logins
from supervisor.control.loopback import open_page
from supervisor.control.server import open_control
from supervisor.control.snapshot import GpuView, Link, ModelView, Snapshot
from supervisor.control.surface import Surface
from supervisor.control.why import explained
from supervisor.intake.holds import Hold, Source
from supervisor.observe.ring import Ring
from supervisor.settings import PageTable

CHROMIUM = os.environ.get("BULKHEAD_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome") or ""
REASON = "no Chromium was found; on Debian: apt install chromium, elsewhere set BULKHEAD_CHROMIUM to its path"

GIB = 2**30
PATIENCE_MS = 60_000
ARGUMENTS = [
    "--no-sandbox",  # the tests may run as root in a container, where Chromium's sandbox cannot
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP *.test 127.0.0.1",
]
SHOWN = Snapshot(
    version="1.2",
    worker="box",
    pid=7,
    now=time.time(),
    uptime_s=93_784.0,
    link=Link(url="ws://127.0.0.1:8080", connected=True),
    models=(
        ModelView(name="chat", engine="llm", state="ready", device="cuda", vram_bytes=5 * GIB, idle_s=75.0),
        ModelView(name="<img src=x onerror=alert(1)>", engine="whisper", state="cold"),
    ),
    gpus=(GpuView(uuid="GPU-1", name="One", total_bytes=24 * GIB, free_bytes=17 * GIB, ours_bytes=5 * GIB),),
)


class Acts:
    """Notes what it is asked, and holds when it is to pause."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.shown = SHOWN

    def pause(self, reason: str, **more: Any) -> None:
        self.asked.append(("pause", reason, more["for_s"], more["free_vram"]))
        self._hold(reason)

    def resume(self, **_more: Any) -> bool:
        self.asked.append(("resume",))
        self.shown = msgspec.structs.replace(self.shown, holds=())
        return True

    def drain(self, reason: str, *, restart: bool) -> None:
        self.asked.append(("drain", reason, restart))

    def load(self, model: str) -> str:
        self.asked.append(("load", model))
        return "It is being loaded."

    def unload(self, model: str, reason: str) -> str:
        self.asked.append(("unload", model, reason))
        return "It ends."

    def restart(self, model: str, reason: str, *, now: bool) -> str:
        self.asked.append(("restart", model, reason, now))
        return "It ends and comes back."

    def cordon(self, gpu: str, order: Any) -> Hold:
        self.asked.append(("cordon", gpu, order.reason, order.for_s, order.unload))
        return self._hold(order.reason, gpu)

    def uncordon(self, gpu: str) -> bool:
        self.asked.append(("uncordon", gpu))
        self.shown = msgspec.structs.replace(self.shown, holds=())
        return True

    def cancel_job(self, job: str, _reason: str) -> int:
        self.asked.append(("cancel", job))
        return 1

    def _hold(self, reason: str, gpu: str = "") -> Hold:
        hold = Hold(source=Source.OPERATOR, reason=reason, since=time.time(), until=None, gpu=gpu)
        self.shown = msgspec.structs.replace(self.shown, holds=(hold,))
        return hold


@dataclasses.dataclass
class Served:
    """A page, and the owner's socket beside it."""

    socket: Path
    acts: Acts
    ring: Ring = dataclasses.field(default_factory=Ring)
    url: str = ""
    first: Snapshot = SHOWN  # what is shown before anything happens
    run_sync: Callable[..., None] = print  # on the supervisor's thread
    look: Callable[[], None] = print  # something changed

    def code_url(self) -> str:
        """What `supervisor ui` opens."""
        return str(ask(self.socket, "POST", "/v1/login-code", {})["url"])

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @staticmethod
    def wait_until(true: Callable[[], object], tab: Any) -> None:
        """Look again and again, letting the browser go on; AssertionError after a while."""
        end = time.monotonic() + PATIENCE_MS / 1000
        while not true():
            assert time.monotonic() < end
            tab.wait_for_timeout(20)

    @staticmethod
    def status_of(tab: Any, method: str, path: str, token: str = "", kind: str = "", body: str | None = None) -> int:
        """The status of a request that the page in this tab makes."""
        headers = {
            **({"authorization": f"Bearer {token}"} if token else {}),
            **({"content-type": kind} if kind else {}),
        }
        return int(
            tab.evaluate(
                "async ([path, options]) => (await fetch(path, options)).status",
                [path, {"method": method, "headers": headers, **({} if body is None else {"body": body})}],
            )
        )


@pytest.fixture(scope="module")
def clock() -> list[float]:
    """Seconds that are added to the clock of the logins."""
    return [0.0]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """The browser, for all tests of a module."""
    sync_api: Any = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip(REASON)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def running(tmp_path_factory, clock, chromium) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("page") / "control.sock", Acts())
    up = threading.Event()
    end: list[Callable[[], None]] = []

    async def serve() -> None:
        logins = Logins(clock=lambda: time.monotonic() + clock[0])
        book = JobBook()
        book.began("job_1", 1, "llm", "chat")
        book.entered("job_1", 1, "run")
        book.began("job_2", 2, "llm", "chat")
        book.ended("job_2", 2, "failed", "engine_failed", {})
        events = Events(lambda: explained(served.acts.shown), book.changes)
        served.look = lambda: served.run_sync(events.look)
        surface = Surface(
            lambda: explained(served.acts.shown),
            served.acts,
            events=events,
            jobs=book,
            lines=served.ring,
            logins=logins,
        )
        served.run_sync, done = trio.lowlevel.current_trio_token().run_sync_soon, trio.Event()
        end.append(lambda: served.run_sync(done.set))
        async with (
            trio.open_nursery() as nursery,
            open_control(served.socket, surface),
            open_page(PageTable(enabled=True), surface),
        ):
            nursery.start_soon(events.run)
            served.url = logins.url
            up.set()
            await done.wait()
            nursery.cancel_scope.cancel()

    thread = threading.Thread(target=trio.run, args=(serve,))
    thread.start()
    assert up.wait(60)
    yield served
    end[0]()
    thread.join(60)
    assert not thread.is_alive()


@pytest.fixture
def served(running, clock) -> Served:
    running.acts.asked.clear()
    running.acts.shown = SHOWN
    clock[0] = 0.0
    return running


@pytest.fixture
def tab(chromium) -> Iterator[Any]:
    """A tab of a browser that knows nothing yet; what went wrong in it is in `problems`."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    page.problems, page.asked = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("console", lambda said: page.problems.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    yield page
    context.close()


@pytest.fixture
def signed(served, tab) -> Any:
    """A tab that has opened a session."""
    tab.goto(served.code_url())
    tab.get_by_role("heading", name="idle").wait_for()
    return tab


class Enemy(http.server.BaseHTTPRequestHandler):
    """An empty page of somebody else."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>enemy</title>")

    def log_message(self, *_words: Any) -> None:
        pass


@pytest.fixture(scope="module")
def enemy() -> Iterator[int]:
    """The port of another program on this machine that serves pages."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Enemy) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()
