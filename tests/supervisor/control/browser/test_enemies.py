"""What a real Chromium lets other pages do to ours, and ours to itself: nothing that matters."""

from __future__ import annotations

import logging
import re

import pytest

from supervisor.control import login

PATIENCE_MS = 60_000
pytestmark = pytest.mark.browser

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
    refused = set(re.findall(r"refused (\w+) '(/v1/\w+)': No page of ('http|another site)", caplog.text))
    assert refused >= {
        ("POST", "/v1/pause", "'http"),  # by its Origin
        ("OPTIONS", "/v1/pause", "'http"),
        ("GET", "/v1/status", "'http"),
        ("GET", "/v1/status", "another site"),  # without one, by Sec-Fetch-Site
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
    assert served.status_of(tab, "GET", "/v1/health") == 403


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
    served.wait_until(lambda: any("frame" in problem for problem in signed.problems), signed)


def test_another_port_gets_no_cookie_and_no_storage(served, signed, enemy):
    page = signed.context.new_page()
    page.goto(f"http://127.0.0.1:{enemy}/")
    assert page.evaluate("[document.cookie, sessionStorage.length, localStorage.length]") == ["", 0, 0]


# ---- our own page without what it needs


def test_no_token_no_json_no_code(served, signed):
    token = signed.evaluate("sessionStorage.getItem('bulkhead-session')")
    assert served.status_of(signed, "GET", "/v1/status") == 401
    assert served.status_of(signed, "POST", "/v1/pause", kind="application/json", body="{}") == 401
    assert served.status_of(signed, "POST", "/v1/pause", token, "text/plain", "{}") == 415
    assert served.status_of(signed, "POST", "/v1/pause", token) == 415
    assert served.status_of(signed, "POST", "/v1/login-code", token, "application/json", "{}") == 403
    assert served.acts.asked == []
    assert served.status_of(signed, "GET", "/v1/status", token) == 200


def test_nothing_inline_runs(served, signed):
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
    served.wait_until(lambda: any("Content Security Policy" in problem for problem in signed.problems), signed)


def test_daily_use_violates_no_policy_and_logs_no_error(served, signed):
    signed.get_by_role("button", name="Pause…").click()
    signed.get_by_role("dialog").get_by_role("button", name="Pause").click()
    signed.get_by_role("heading", name="paused").wait_for()
    signed.get_by_role("button", name="Lift").click()
    signed.get_by_role("heading", name="idle").wait_for()
    signed.get_by_text("Configuration").click()
    signed.get_by_text("started without a file").wait_for()
    signed.get_by_label("Level").select_option("warning")
    # The configuration of this supervisor has no file and is answered 503, which the browser counts as an error.
    assert [problem for problem in signed.problems if "503" not in problem] == []
