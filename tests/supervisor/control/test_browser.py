"""The page in a real Chromium: what it shows and does, and that no other page gets anything from it.

The supervisor's side runs on a thread of its own; the browser is driven from the test's. Nothing outside this machine
is asked for: the names of the attackers are mapped to 127.0.0.1.
"""

from __future__ import annotations

import dataclasses
import http.server
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from supervisor.control import login
from supervisor.control.client import ask
from supervisor.control.login import Logins
from supervisor.control.loopback import open_page
from supervisor.control.server import open_control
from supervisor.control.snapshot import GpuView, Link, ModelView, Snapshot
from supervisor.control.surface import Surface
from supervisor.control.why import explained
from supervisor.intake.holds import Hold, Source
from supervisor.settings import PageTable

CHROMIUM = os.environ.get("BULKHEAD_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome") or ""
REASON = "no Chromium was found; on Debian: apt install chromium, elsewhere set BULKHEAD_CHROMIUM to its path"
sync_api: Any = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM, reason=REASON)]

GIB = 2**30
PATIENCE_MS = 15_000
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
        self.shown = msgspec.structs.replace(
            self.shown, holds=(Hold(source=Source.OPERATOR, reason=reason, since=time.time(), until=None),)
        )

    def resume(self, **_more: Any) -> bool:
        self.asked.append(("resume",))
        self.shown = msgspec.structs.replace(self.shown, holds=())
        return True

    def drain(self, reason: str, *, restart: bool) -> None:
        self.asked.append(("drain", reason, restart))


@dataclasses.dataclass
class Served:
    """A page, and the owner's socket beside it."""

    socket: Path
    acts: Acts
    url: str = ""

    def code_url(self) -> str:
        """What `supervisor ui` opens."""
        return str(ask(self.socket, "POST", "/v1/login-code", {})["url"])

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


@pytest.fixture(scope="module")
def clock() -> list[float]:
    """Seconds that are added to the clock of the logins."""
    return [0.0]


@pytest.fixture(scope="module")
def running(tmp_path_factory, clock) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("page") / "control.sock", Acts())
    up = threading.Event()
    end: list[Callable[[], None]] = []

    async def serve() -> None:
        logins = Logins(clock=lambda: time.monotonic() + clock[0])
        surface = Surface(lambda: explained(served.acts.shown), served.acts, logins=logins)
        token, done = trio.lowlevel.current_trio_token(), trio.Event()
        end.append(lambda: token.run_sync_soon(done.set))
        async with open_control(served.socket, surface), open_page(PageTable(enabled=True), surface):
            served.url = logins.url
            up.set()
            await done.wait()

    thread = threading.Thread(target=trio.run, args=(serve,))
    thread.start()
    assert up.wait(20)
    yield served
    end[0]()
    thread.join(20)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


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
    page.problems = []
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


def wait_until(true: Callable[[], object], tab: Any) -> None:
    """Look again and again, letting the browser go on; AssertionError after a while."""
    end = time.monotonic() + PATIENCE_MS / 1000
    while not true():
        assert time.monotonic() < end
        tab.wait_for_timeout(20)


# ---- the owner


def test_the_code_becomes_a_session_and_leaves_no_trace(served, signed):
    assert signed.url == f"{served.url}/"
    assert signed.context.cookies() == []
    assert signed.evaluate("document.cookie") == ""
    token = signed.evaluate("sessionStorage.getItem('bulkhead-session')")
    assert len(token) >= 43
    assert token not in json.dumps(signed.evaluate("({...localStorage})"))
    signed.go_back()
    assert "c=" not in signed.url
    kept = [problem for problem in signed.problems if "Content Security Policy" in problem]
    assert kept == []


def test_a_reload_keeps_the_session_and_a_new_tab_has_none(served, signed):
    signed.reload()
    signed.get_by_role("heading", name="idle").wait_for()
    other = signed.context.new_page()
    other.goto(served.url)
    other.get_by_text("supervisor ui").wait_for()
    assert other.get_by_role("button", name="Pause").count() == 0


def test_what_is_shown_is_text_and_never_markup(signed):
    signed.get_by_text("<img src=x onerror=alert(1)>").first.wait_for()
    assert signed.locator("img").count() == 0
    assert signed.locator("svg.memory").get_attribute("aria-label") == (
        "Of 24 GiB: our models 5.0 GiB, others, or unknown 2.0 GiB, free 17 GiB"
    )


def test_pause_and_resume_by_keyboard_alone(served, signed):
    signed.get_by_role("button", name="Pause…").focus()
    signed.keyboard.press("Enter")
    signed.get_by_role("dialog").wait_for()
    signed.get_by_role("dialog").get_by_label("For").first.select_option("3600")
    signed.get_by_label("Reason").focus()
    signed.keyboard.type("a game")
    signed.keyboard.press("Enter")
    signed.get_by_role("heading", name="paused").wait_for()
    assert served.acts.asked == [("pause", "a game", 3600.0, False)]
    signed.get_by_text("Paused by the operator (a game)").wait_for()
    signed.get_by_role("button", name="Resume").click()
    signed.get_by_role("heading", name="idle").wait_for()
    assert served.acts.asked[1:] == [("resume",)]


def test_a_question_that_is_called_off_orders_nothing(served, signed):
    signed.get_by_role("button", name="Stop or restart").click()
    signed.keyboard.press("Escape")
    signed.get_by_role("button", name="Stop or restart").click()
    signed.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    signed.get_by_role("button", name="Pause…").wait_for()
    assert served.acts.asked == []


def test_what_changes_is_shown_without_a_reload_and_the_focus_stays(served, signed):
    signed.get_by_role("button", name="Pause…").focus()
    served.acts.shown = msgspec.structs.replace(SHOWN, worker="renamed")
    signed.get_by_text("renamed").wait_for()
    assert signed.evaluate("document.activeElement.textContent") == "Pause…"


def test_a_phone_needs_no_sideways_scrolling_and_a_wide_screen_has_two_columns(signed):
    wide = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
    for width in (360, 768, 1280, 1600):
        signed.set_viewport_size({"width": width, "height": 800})
        assert not signed.evaluate(wide), f"{width} px"
    left, right = (signed.locator(f"#{name}").bounding_box() for name in ("gpus", "logs"))
    assert right["x"] > left["x"] + left["width"] / 2


def test_the_theme_is_the_systems_until_one_is_chosen(signed):
    paper = "getComputedStyle(document.body).backgroundColor"
    light = signed.evaluate(paper)
    signed.emulate_media(color_scheme="dark")
    dark = signed.evaluate(paper)
    assert light != dark
    signed.get_by_role("button", name="Theme: system").click()
    assert signed.evaluate(paper) == light
    signed.reload()
    signed.get_by_role("button", name="Theme: light").click()
    assert signed.evaluate(paper) == dark


def test_signing_out_ends_the_session(served, signed):
    token = signed.evaluate("sessionStorage.getItem('bulkhead-session')")
    signed.get_by_role("button", name="Sign out").click()
    signed.get_by_text("Signed out.").wait_for()
    assert signed.evaluate("sessionStorage.length") == 0
    assert status_of(signed, "GET", "/v1/status", token=token) == 401


def test_a_lost_connection_is_said_and_mended(signed):
    signed.context.set_offline(True)
    signed.get_by_text("Connection lost, retrying").wait_for()
    signed.context.set_offline(False)
    signed.get_by_text("Connected again.").wait_for()


def test_a_session_that_has_ended_asks_for_another(served, signed, clock):
    clock[0] += login.SESSION_IDLE_S + 1
    signed.get_by_text("The session has ended.").wait_for()
    assert signed.get_by_role("button", name="Pause").count() == 0


# ---- codes


def test_a_code_works_once(served, signed, chromium):
    url = served.code_url()
    for sentence in ("up 1d 02h", "This code was used"):
        with chromium.new_context() as context:
            page = context.new_page()
            page.goto(url)
            page.get_by_text(sentence).wait_for(timeout=PATIENCE_MS)
            assert page.url == f"{served.url}/"


def test_a_code_is_good_for_a_minute(served, tab, clock):
    url = served.code_url()
    clock[0] += login.CODE_S + 1
    tab.goto(url)
    tab.get_by_text("older than 60 s").wait_for()
    assert tab.evaluate("sessionStorage.length") == 0


# ---- other pages

ATTACKS = """async ([url, token]) => {
  const told = [];
  const tries = [
    [`${url}/v1/pause`, {method: "POST", mode: "no-cors", body: "{}"}],
    [`${url}/v1/pause`, {method: "POST", mode: "no-cors", body: "{}", headers: {"content-type": "text/plain"}}],
    [`${url}/v1/pause`, {method: "POST", body: "{}", headers: {"content-type": "application/json"}}],
    [`${url}/v1/pause`, {method: "POST", body: "{}", headers: {
      "content-type": "application/json", authorization: `Bearer ${token}`}}],
    [`${url}/v1/status`, {}],
    [`${url}/v1/status`, {mode: "no-cors"}],
    [`${url}/v1/health`, {}],
  ];
  for (const [target, options] of tries) {
    try {
      const answer = await fetch(target, options);
      told.push(`${answer.type} ${answer.status} ${await answer.text()}`);
    } catch (problem) {
      told.push("blocked");
    }
  }
  return told;
}"""


@pytest.mark.parametrize("host", ["127.0.0.1", "attacker.test"], ids=["another port", "another site"])
def test_another_page_learns_and_changes_nothing(served, signed, enemy, host, caplog):
    """Even with the token, which it cannot have: the origin is looked at before."""
    token = signed.evaluate("sessionStorage.getItem('bulkhead-session')")
    page = signed.context.new_page()
    page.goto(f"http://{host}:{enemy}/")
    with caplog.at_level(logging.WARNING, "supervisor.control.loopback"):
        told = page.evaluate(ATTACKS, [served.url, token])
    assert set(told) == {"blocked"}  # CORP keeps even the opaque answers away
    assert served.acts.asked == []
    refused = re.findall(r"refused (\w+) '(/v1/\w+)': (No page of [^\n]*)", caplog.text)
    assert {(method, path) for method, path, _why in refused} >= {
        ("POST", "/v1/pause"),
        ("OPTIONS", "/v1/pause"),
        ("GET", "/v1/status"),
    }


@pytest.mark.parametrize("host", ["127.0.0.1", "attacker.test"])
def test_a_form_of_another_page_is_refused(served, signed, enemy, host):
    page = signed.context.new_page()
    page.goto(f"http://{host}:{enemy}/")
    with page.expect_navigation() as navigation:
        page.evaluate(
            """url => {
              const form = document.createElement("form");
              Object.assign(form, {method: "post", action: `${url}/v1/pause`, enctype: "text/plain"});
              document.body.append(form);
              form.submit();
            }""",
            served.url,
        )
    assert navigation.value.status == 403
    assert served.acts.asked == []


def test_a_name_that_was_rebound_to_this_machine_is_refused(served, tab):
    answer = tab.goto(f"http://rebound.test:{served.port}/")
    assert answer.status == 403
    assert "This is not 'rebound.test" in answer.text()
    assert status_of(tab, "GET", "/v1/health") == 403


def test_a_link_from_another_site_does_not_open_the_page(served, signed, enemy):
    page = signed.context.new_page()
    page.goto(f"http://attacker.test:{enemy}/")
    with page.expect_navigation() as navigation:
        page.evaluate("url => { location.href = url; }", served.url)
    assert navigation.value.status == 403


@pytest.mark.parametrize("host", ["127.0.0.1", "attacker.test"])
def test_the_page_cannot_be_framed(served, tab, enemy, host):
    tab.goto(f"http://{host}:{enemy}/")
    tab.evaluate(
        """url => new Promise(resolve => {
          const frame = document.createElement("iframe");
          frame.onload = resolve;
          frame.src = url;
          document.body.append(frame);
        })""",
        served.url,
    )
    assert [frame.title() for frame in tab.frames if frame.parent_frame and frame.url.startswith(served.url)] == []


def test_the_page_does_not_even_frame_itself(served, signed):
    signed.evaluate(
        """() => new Promise(resolve => {
          const frame = document.createElement("iframe");
          frame.onload = frame.onerror = resolve;
          frame.src = "/";
          document.body.append(frame);
        })"""
    )
    wait_until(lambda: any("frame" in problem for problem in signed.problems), signed)


def test_another_port_gets_no_cookie_and_no_storage(served, signed, enemy):
    page = signed.context.new_page()
    page.goto(f"http://127.0.0.1:{enemy}/")
    assert page.evaluate("[document.cookie, sessionStorage.length, localStorage.length]") == ["", 0, 0]


# ---- our own page without what it needs


def status_of(tab: Any, method: str, path: str, token: str = "", kind: str = "", body: str | None = None) -> int:
    """The status of a request that the page in this tab makes."""
    headers = {**({"authorization": f"Bearer {token}"} if token else {}), **({"content-type": kind} if kind else {})}
    return int(
        tab.evaluate(
            "async ([path, options]) => (await fetch(path, options)).status",
            [path, {"method": method, "headers": headers, **({} if body is None else {"body": body})}],
        )
    )


def test_no_token_no_json_no_code(served, signed):
    token = signed.evaluate("sessionStorage.getItem('bulkhead-session')")
    assert status_of(signed, "GET", "/v1/status") == 401
    assert status_of(signed, "POST", "/v1/pause", kind="application/json", body="{}") == 401
    assert status_of(signed, "POST", "/v1/pause", token, "text/plain", "{}") == 415
    assert status_of(signed, "POST", "/v1/pause", token) == 415
    assert status_of(signed, "POST", "/v1/login-code", token, "application/json", "{}") == 403
    assert served.acts.asked == []
    assert status_of(signed, "GET", "/v1/status", token) == 200


def test_nothing_inline_runs(signed):
    signed.evaluate(
        """() => {
          const script = document.createElement("script");
          try { script.textContent = "window.ran = 1"; } catch { /* trusted types */ }
          document.body.append(script);
          const style = document.createElement("style");
          style.textContent = "body { display: none }";
          document.body.append(style);
        }"""
    )
    assert signed.evaluate("window.ran") is None
    assert signed.evaluate("getComputedStyle(document.body).display") == "block"
    wait_until(lambda: any("Content Security Policy" in problem for problem in signed.problems), signed)


def test_daily_use_violates_no_policy_and_logs_no_error(served, signed):
    signed.get_by_role("button", name="Pause…").click()
    signed.get_by_role("dialog").get_by_role("button", name="Pause").click()
    signed.get_by_role("heading", name="paused").wait_for()
    signed.get_by_role("button", name="Lift").click()
    signed.get_by_role("heading", name="idle").wait_for()
    signed.get_by_text("Configuration").click()
    signed.get_by_text("started without a file").wait_for()
    signed.get_by_label("Level").select_option("warning")
    # What this supervisor does not keep (its log, events, jobs) is answered 503, which the browser counts as an error.
    assert [problem for problem in signed.problems if "503" not in problem] == []
