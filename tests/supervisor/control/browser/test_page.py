"""The page in a real Chromium: what it shows, what its buttons order, and how it holds on to the supervisor."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

import msgspec
import pytest

from supervisor.control import login

PATIENCE_MS = 60_000
pytestmark = pytest.mark.browser

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
    assert "Paused by the operator (a game)" in signed.locator(".why").inner_text()
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
    served.acts.shown = msgspec.structs.replace(served.first, worker="renamed")
    signed.get_by_text("renamed").wait_for()
    assert signed.evaluate("document.activeElement.textContent") == "Pause…"


def test_single_models_gpus_and_jobs_are_ordered_about(served, signed):
    signed.get_by_role("button", name="Unload chat").click()
    signed.get_by_text("It ends.").wait_for()
    signed.get_by_role("button", name="Restart chat").click()
    signed.get_by_text("It ends and comes back.").wait_for()
    signed.get_by_role("button", name="Load <img").click()
    signed.get_by_text("It is being loaded.").wait_for()
    signed.get_by_role("button", name="Cancel job job_1").click()
    signed.get_by_text("The job is cancelled.").wait_for()
    signed.get_by_role("button", name="Keep GPU One free").click()
    signed.get_by_role("dialog").get_by_label("Also end the models").check()
    signed.get_by_role("dialog").get_by_role("button", name="Keep it free").click()
    signed.get_by_role("button", name="Use GPU One again").click()
    signed.get_by_role("button", name="Keep GPU One free").wait_for()
    assert served.acts.asked == [
        ("unload", "chat", ""),
        ("restart", "chat", "", False),
        ("load", "<img src=x onerror=alert(1)>"),
        ("cancel", "job_1"),
        ("cordon", "GPU-1", "", None, True),
        ("uncordon", "GPU-1"),
    ]


def test_jobs_are_listed_with_what_became_of_them(served, signed):
    rows = signed.locator("#jobs tbody tr")
    served.wait_until(lambda: rows.count() == 2, signed)
    assert "running" in rows.nth(0).inner_text()
    assert "engine_failed" in rows.nth(1).inner_text()
    assert rows.nth(1).get_by_role("button").count() == 0


def test_the_log_is_followed_from_a_level_on(served, signed):
    logger = logging.getLogger("tests.browser")

    def say(level: int, text: str) -> None:
        served.ring.add(logger.makeRecord(logger.name, level, "", 0, text, (), None), {})

    lines = signed.locator("#lines li")
    say(logging.INFO, "first of all")
    lines.get_by_text("first of all").wait_for()
    say(logging.WARNING, "a <b>warning</b>")
    lines.get_by_text("a <b>warning</b>").wait_for()
    signed.get_by_label("Level").select_option("warning")
    served.wait_until(lambda: "first of all" not in " ".join(lines.all_inner_texts()), signed)
    say(logging.INFO, "not wanted")
    say(logging.ERROR, "worse")
    lines.get_by_text("worse").wait_for()
    assert signed.locator("#lines").get_by_text("not wanted").count() == 0


def hide(tab: Any, hidden: bool) -> None:
    """As if another tab were looked at; a headless browser shows all of them."""
    tab.evaluate(
        """hidden => {
          Object.defineProperty(document, "hidden", {value: hidden, configurable: true});
          document.dispatchEvent(new Event("visibilitychange"));
        }""",
        hidden,
    )


def test_a_hidden_tab_lets_its_streams_go_and_goes_on_where_it_was(served, signed):
    """A browser has six connections to a host, all tabs together."""
    streams = lambda: [url for url in signed.asked if "/v1/events" in url]  # noqa: E731
    gone: list[str] = []
    signed.on("requestfailed", lambda request: gone.append(request.url))
    served.wait_until(streams, signed)
    served.acts.shown = msgspec.structs.replace(served.first, worker="renamed", models=())
    served.look()
    signed.get_by_text("No model is configured;").wait_for()
    hide(signed, True)
    served.wait_until(
        lambda: any("/v1/events" in url for url in gone) and any("/v1/logs" in url for url in gone), signed
    )
    before = len(signed.asked)
    served.acts.shown = served.first
    served.look()
    hide(signed, False)
    signed.get_by_role("button", name="Unload chat").wait_for()
    served.wait_until(lambda: len(streams()) == 2, signed)
    assert "?since=" not in streams()[0]
    assert re.search(r"\?since=[0-9a-f]+-\d+$", streams()[1])
    assert before < len(signed.asked)


def test_eight_tabs_are_all_served(served, signed):
    """Those that are hidden hold no connection; with three streams of two connections each the next would hang."""
    tabs = []
    for _ in range(7):
        page = signed.context.new_page()
        page.goto(served.code_url())
        page.get_by_role("heading", name="idle").wait_for(timeout=PATIENCE_MS)
        hide(page, True)
        tabs.append(page)
    hide(tabs[0], False)
    tabs[0].get_by_role("button", name="Pause…").click()
    tabs[0].get_by_role("dialog").wait_for(timeout=PATIENCE_MS)


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
    assert served.status_of(signed, "GET", "/v1/status", token=token) == 401


def test_a_lost_connection_is_said_and_mended(signed):
    signed.context.set_offline(True)
    signed.get_by_text("Connection lost, retrying").wait_for()
    signed.context.set_offline(False)
    signed.get_by_text("Connected again.").wait_for()


@pytest.mark.parametrize("status", [404, 503])
def test_a_supervisor_without_events_log_and_jobs_is_shown_all_the_same(served, tab, status):
    body = json.dumps({"error": {"message": "It keeps none."}})
    for path in ("events", "logs", "jobs", "config"):
        tab.route(
            f"**/v1/{path}*", lambda route: route.fulfill(status=status, body=body, content_type="application/json")
        )
    tab.goto(served.code_url())
    tab.get_by_role("button", name="Pause…").wait_for()
    tab.get_by_text("Configuration").click()
    words = {404: "This supervisor does not ", 503: "It keeps none."}[status]
    for section in ("logs", "jobs", "config"):
        tab.locator(f"#{section}").get_by_text(words).wait_for()
    tries = {404: 1, 503: 2}[status]  # what may come back is asked for again
    served.wait_until(lambda: sum("/v1/events" in url for url in tab.asked) >= tries, tab)
    served.acts.shown = msgspec.structs.replace(served.first, worker="renamed")
    tab.get_by_text("renamed").wait_for()
    assert tab.locator("#notice").inner_text() == ""


def test_a_session_that_has_ended_asks_for_another(served, signed, clock):
    clock[0] += login.SESSION_IDLE_S + 1
    signed.get_by_text("The session has ended.").wait_for()
    assert signed.get_by_role("button", name="Pause").count() == 0
