"""The dashboard in a real Chromium: what it shows, what its buttons do to a real coordinator, and who can use it."""

from __future__ import annotations

import json
import secrets
from typing import Any

import pytest

from coordinator.store import StoreError
from protocol import link_wire as wire
from protocol.faults import Fault
from tests.coordinator.dashboard.browser.conftest import EVIL, PATIENCE_S, Box, Site

pytestmark = pytest.mark.browser


def ask_to_join(site: Site, machine: str) -> str:
    """A studio worker asks to be let in; the request's id."""
    registrations = site.served.coordinator.parts.registrations
    told = {"machine": machine, "user": "anna", "models": ["draw"]}
    return registrations.request(secrets.token_hex(8), "10.0.0.7", secrets.token_bytes(32), "studio 2", told)[0]


def confirm(tab: Any, word: str) -> None:
    """Press the button of the dialog that asks whether it is meant."""
    tab.get_by_role("dialog").get_by_role("button", name=word, exact=True).click()
    tab.get_by_role("dialog").wait_for(state="hidden")


# ---- the session


def test_the_key_is_typed_once_and_kept_nowhere(site: Site, signed: Any) -> None:
    (cookie,) = signed.context.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
    kept = json.dumps(signed.evaluate("[{...localStorage}, {...sessionStorage}, document.cookie, location.href]"))
    assert site.key not in kept
    assert cookie["value"] not in kept
    signed.reload()
    signed.get_by_role("heading", name="serving").wait_for()
    assert signed.problems == []


def test_a_wrong_key_is_told_and_nothing_is_shown(site: Site, tab: Any) -> None:
    tab.goto(site.url)
    tab.get_by_label("Admin key").fill("bha_" + "a" * 43)
    tab.keyboard.press("Enter")
    assert "coordinator keys list" in tab.get_by_role("alert").inner_text()
    assert tab.evaluate("document.activeElement.name") == "key"
    assert tab.locator("main section:visible").count() == 1


def test_signing_out_and_a_revoked_key_end_everything(site: Site, signed: Any) -> None:
    signed.get_by_role("button", name="Sign out").click()
    signed.get_by_text("Signed out.").wait_for()
    assert signed.evaluate("localStorage.getItem('bulkhead-page')") is None
    assert signed.context.cookies() == []
    signed.get_by_label("Admin key").fill(site.key)
    signed.get_by_role("button", name="Open the dashboard").click()
    signed.get_by_role("heading", name="serving").wait_for()
    site.served.coordinator.keys.revoke(site.key[:12])
    signed.get_by_text("The session has ended").wait_for()
    assert signed.locator("#workers").inner_text() == ""


# ---- what is shown


def test_without_workers_it_says_how_one_joins(site: Site, signed: Any) -> None:
    signed.get_by_text("coordinator workers enrol").wait_for()
    signed.get_by_text(f"supervisor enrol {site.url}").wait_for()
    box = site.box("newcomer", "chat")
    signed.get_by_role("article", name="Worker newcomer").wait_for()
    assert signed.get_by_text("coordinator workers enrol").count() == 0
    box.leave()
    signed.get_by_text("coordinator workers enrol").wait_for()


def test_a_worker_is_shown_with_its_gpus_models_sandbox_and_hold(site: Site, signed: Any) -> None:
    site.box("rack", "chat", accepting=False, reason="Paused by its owner: a game", labels={"room": "cellar"})
    card = signed.get_by_role("article", name="Worker rack")
    card.get_by_text("Paused by its owner: a game").wait_for()
    card.get_by_text("Card 0: 17 GiB of 24 GiB used").wait_for()  # told by a heartbeat, a look after the hello maybe
    text = card.inner_text()
    for words in ("paused", "0 of 2 slots", "Card 0: 17 GiB of 24 GiB used", "50 % busy", "61 °C", "180 W", "62 °C"):
        assert words in text
    card.locator("summary").click()
    card.get_by_text("net unavailable(EPERM)").wait_for()
    for words in ("chat", "fake", "cuda", "5.0 GiB", "room=cellar", "version 1.2", "speaks native"):
        assert words in card.inner_text()


def test_what_others_chose_is_text_and_never_markup(site: Site, signed: Any) -> None:
    model = f"draw{EVIL}"
    box = site.box("evil", model, machine=EVIL, version=EVIL, reason=EVIL, accepting=False, labels={EVIL: EVIL})
    box.leave()
    box = site.box("evil", model, machine=EVIL, version=EVIL, labels={EVIL: EVIL})
    job = site.submit(model, labels={EVIL: EVIL})
    (offer,) = box.has_offers(1)
    fault = Fault("engine_failed", f"{EVIL}<script>alert(2)</script>")
    box.raw.send(wire.Fail(fault=fault), offer.job, offer.attempt)
    site.submit(EVIL)
    request = ask_to_join(site, EVIL)
    row = signed.locator(f'#jobs tr[data-key="{job}"]')
    row.get_by_text("<script>alert(2)</script>").wait_for()
    row.locator("summary").click()
    row.get_by_text("1: failed on evil").wait_for()
    signed.get_by_role("article", name="Worker evil").locator("summary").click()
    signed.locator(f'#pending li[data-key="{request}"]').wait_for()
    signed.locator("#queues").get_by_text(EVIL).nth(1).wait_for()
    signed.get_by_role("button", name=f"Reject {EVIL}").click()
    confirm(signed, "Reject")
    assert signed.locator("img, script:not([src])").count() == 0
    assert signed.evaluate("[...document.querySelectorAll('*')].some(one => one.getAttribute('onerror'))") is False
    assert signed.problems == []


def test_the_queue_says_what_waits_and_why(site: Site, signed: Any) -> None:
    job = site.submit("of-nobody")
    row = signed.locator('#queues tr[data-key="llm/of-nobody"]')
    row.get_by_text("not served here").or_(row.get_by_text("No worker is connected")).wait_for()
    assert row.locator('[data-word="Waiting"]').inner_text() == "1"
    site.client.post(f"/v1/jobs/{job}/cancel")
    row.wait_for(state="detached")


def test_jobs_are_paged_and_filtered(site: Site, signed: Any) -> None:
    made = [site.submit("pages", priority=-1) for _ in range(30)]
    signed.locator(f'#jobs tr[data-key="{made[-1]}"]').wait_for()
    assert signed.locator("#jobs tbody tr").count() == 25
    signed.get_by_role("button", name="Older").click()
    signed.locator(f'#jobs tr[data-key="{made[0]}"]').wait_for()
    signed.get_by_role("button", name="Newer").click()
    signed.locator(f'#jobs tr[data-key="{made[-1]}"]').wait_for()
    site.client.post(f"/v1/jobs/{made[3]}/cancel")
    signed.locator("#job-state").select_option("cancelled")
    signed.locator(f'#jobs tr[data-key="{made[3]}"]').wait_for()
    assert signed.locator(f'#jobs tr[data-key="{made[-1]}"]').count() == 0
    for job in made:
        site.client.post(f"/v1/jobs/{job}/cancel")


def test_a_hundred_workers_are_paged_and_found(site: Site, signed: Any) -> None:
    models = ("chat",)
    boxes = [site.box(f"box-{n:03}", *models) for n in range(30)]
    signed.get_by_text(f"1 to 20 of {len(boxes)}").wait_for()
    assert signed.locator("#workers article").count() == 20
    signed.locator("#workers").get_by_role("button", name="After").click()
    signed.get_by_role("article", name="Worker box-029").wait_for()
    signed.get_by_label("Find a worker").fill("BOX-007")
    signed.get_by_role("article", name="Worker box-007").wait_for()
    assert signed.locator("#workers article").count() == 1
    signed.get_by_label("Find a worker").fill("nothing like it")
    signed.get_by_text("No worker is like that.").wait_for()


def test_usage_is_shown_by_whom_and_saved(site: Site, signed: Any) -> None:
    box = site.box("earner", "counted")
    job = site.submit("counted")
    (offer,) = box.has_offers(1)
    result = wire.msgspec.Raw(wire.msgspec.msgpack.encode({"content": "done"}))
    usage = {"prompt_tokens": 1200.0, "completion_tokens": 34.0}
    box.raw.send(wire.Complete(result=result, usage=usage), offer.job, offer.attempt)
    signed.locator(f'#jobs tr[data-key="{job}"]').get_by_text("succeeded").wait_for()
    signed.locator("#usage-by").select_option("worker")
    row = signed.locator('#usage tr[data-key="earner"]')
    row.wait_for()
    assert row.locator('[data-word="Tokens in"]').inner_text() == "1,200"
    signed.locator("#usage-by").select_option("key")
    signed.locator("#usage tbody tr").first.wait_for()
    with signed.expect_download() as download:
        signed.get_by_role("button", name="Save as CSV").click()
    assert download.value.suggested_filename == "usage-by-key.csv"


# ---- what its buttons do


def test_a_worker_is_paused_resumed_and_drained(site: Site, signed: Any) -> None:
    box = site.box("obeys", "chat")
    signed.get_by_role("button", name="Pause obeys").focus()
    signed.keyboard.press("Enter")
    signed.get_by_role("dialog").get_by_label("For").first.select_option("3600")
    signed.get_by_role("dialog").get_by_label("Reason").fill("lunch")
    signed.keyboard.press("Enter")
    assert box.heard(wire.Pause) == wire.Pause(reason="lunch", for_ms=3_600_000)
    signed.get_by_text("obeys was told to pause.").wait_for()
    held = wire.Capabilities(accepting=False, reason="paused by the coordinator (lunch)")
    box.raw.send(wire.Announce(capabilities=held))
    signed.get_by_role("button", name="Resume obeys").click()
    box.heard(wire.Resume)
    box.raw.send(wire.Announce(capabilities=wire.Capabilities()))
    signed.get_by_role("button", name="Drain obeys").click()
    confirm(signed, "Drain")
    box.heard(wire.Drain)


def test_a_question_that_is_called_off_orders_nothing(site: Site, signed: Any) -> None:
    box = site.box("left-alone", "chat")
    for how in ("Escape", "Keep as it is"):
        signed.get_by_role("button", name="Revoke left-alone").click()
        if how == "Escape":
            signed.keyboard.press("Escape")
        else:
            confirm(signed, how)
    assert signed.evaluate("document.activeElement.getAttribute('aria-label')") == "Revoke left-alone"
    assert not box.closed


def test_a_revoked_worker_is_put_out_at_once(site: Site, signed: Any) -> None:
    token = site.served.coordinator.keys.create("worker", name="lent")
    box = site.box("lent", "chat", token=token)
    signed.get_by_role("button", name="Revoke lent").click()
    confirm(signed, "Revoke")
    signed.get_by_text("lent was put out").wait_for()
    box.until_closed()
    signed.get_by_role("article", name="Worker lent").wait_for(state="detached")


def test_who_asks_to_be_let_in_is_approved_or_rejected(site: Site, signed: Any) -> None:
    good, bad = ask_to_join(site, "good-box"), ask_to_join(site, "bad-box")
    signed.get_by_role("button", name="Approve good-box").click()
    confirm(signed, "Approve")
    signed.get_by_role("button", name="Reject bad-box").click()
    signed.get_by_role("dialog").get_by_label("Reason").fill("unknown")
    confirm(signed, "Reject")
    for name in ("good-box", "bad-box"):
        signed.locator("#pending").get_by_text(name).wait_for(state="detached")
    found = {one["id"]: one for one in site.admin.get("/v1/registrations").json()["data"]}
    assert (found[good]["state"], found[bad]["state"], found[bad]["reason"]) == ("approved", "rejected", "unknown")


def failed_job(site: Site, box: Box, model: str) -> str:
    """A job that has failed for good."""
    before = len(box.offers)
    job = site.submit(model)
    offer = box.has_offers(before + 1)[-1]
    box.raw.send(wire.Fail(fault=Fault("engine_failed", "Out of ideas.")), offer.job, offer.attempt)
    return job


def test_jobs_are_cancelled_and_tried_again(site: Site, signed: Any) -> None:
    box = site.box("works", "tries")
    job = failed_job(site, box, "tries")
    row = signed.locator(f'#jobs tr[data-key="{job}"]')
    row.get_by_text("Out of ideas.").wait_for()
    row.get_by_role("button", name="Retry").click()
    signed.get_by_text("The job waits for another try.").wait_for()
    assert box.has_offers(2)[-1].job == job
    row.get_by_text("running").wait_for()
    row.get_by_role("button", name="Cancel").click()
    confirm(signed, "Cancel the job")
    row.get_by_text("cancelled").wait_for()
    box.heard(wire.Cancel)
    assert site.job(job)["state"] == "cancelled"


def test_what_workers_told_of_a_job_stands_below_its_attempts(site: Site, signed: Any) -> None:
    box = site.box("talks", "talkative")
    job = site.submit("talkative")
    (offer,) = box.has_offers(1)
    lines = (wire.LogLine("then", "warning", f"slow {EVIL}", job), wire.LogLine("then", "info", "of nobody"))
    box.raw.send(wire.LogBatch(lines=lines, dropped=3))
    box.raw.send(wire.Fail(fault=Fault("engine_failed", "Out of ideas.")), offer.job, offer.attempt)
    row = signed.locator(f'#jobs tr[data-key="{job}"]')
    row.get_by_text("Out of ideas.").wait_for()
    row.locator("summary").click()
    told = row.get_by_role("list", name="Log")
    told.get_by_text(f"warning, talks: slow {EVIL}").wait_for()
    assert "of nobody" not in told.inner_text()
    row.get_by_text("3 lines of talks were lost").wait_for()
    assert signed.locator("img").count() == 0
    silent = failed_job(site, box, "talkative")
    row = signed.locator(f'#jobs tr[data-key="{silent}"]')
    row.get_by_text("Out of ideas.").wait_for()
    row.locator("summary").click()
    row.get_by_text("No line of a worker's log is kept").wait_for()
    assert signed.problems == []


def test_a_key_is_revoked(site: Site, signed: Any) -> None:
    secret = site.served.coordinator.keys.create("client", name="intern")
    signed.reload()
    signed.get_by_role("button", name=f"Revoke key {secret[:12]}").click()
    confirm(signed, "Revoke")
    signed.get_by_text(f"The key {secret[:12]}… is good no more.").wait_for()
    assert site.client.get("/v1/models", headers={"authorization": f"Bearer {secret}"}).status_code == 401
    signed.get_by_role("button", name=f"Revoke key {secret[:12]}").wait_for(state="detached")


def test_an_order_that_fails_says_what_to_do(site: Site, signed: Any) -> None:
    box = site.box("fleeting", "chat")
    signed.get_by_role("button", name="Drain fleeting").click()
    box.leave()
    signed.locator("#workers").get_by_text("fleeting").wait_for(state="detached")
    confirm(signed, "Drain")
    signed.get_by_text("GET /v1/workers lists those that are").wait_for()


# ---- for everybody


def test_a_lost_connection_is_said_and_mended(site: Site, signed: Any) -> None:
    signed.context.set_offline(True)
    signed.get_by_text("Connection lost, retrying").wait_for()
    site.box("came-meanwhile", "chat")
    signed.context.set_offline(False)
    signed.get_by_text("Connected again.").wait_for()
    signed.get_by_role("article", name="Worker came-meanwhile").wait_for()


def test_a_store_that_is_away_is_said(site: Site, tab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away() -> Any:
        raise StoreError("away")

    feed = site.served.coordinator.feed
    with monkeypatch.context() as patch:
        patch.setattr(feed, "_look", away)
        feed._picture = None  # it has just begun
        tab.goto(site.url)
        tab.get_by_label("Admin key").fill(site.key)
        tab.keyboard.press("Enter")
        tab.get_by_text("The store does not answer").wait_for()
        tab.get_by_role("heading", name="unknown").wait_for()
    tab.get_by_role("heading", name="serving").wait_for()
    assert tab.get_by_text("The store does not answer").count() == 0


def test_what_changes_leaves_the_focus_and_what_is_typed(site: Site, signed: Any) -> None:
    site.box("first", "chat")
    find = signed.get_by_label("Find a worker")
    find.fill("s")
    signed.get_by_role("article", name="Worker first").locator("summary").click()
    find.focus()
    site.box("second", "chat")
    signed.get_by_role("article", name="Worker second").wait_for()
    assert signed.evaluate("document.activeElement.id") == "find-worker"
    assert find.input_value() == "s"
    assert signed.get_by_role("article", name="Worker first").locator("details").get_attribute("open") is not None


def test_times_are_the_viewers(site: Site, chromium: Any) -> None:
    shown = []
    job = site.submit("nobody-serves-this")
    for zone in ("Asia/Tokyo", "America/New_York"):
        with chromium.new_context(timezone_id=zone) as context:
            page = context.new_page()
            page.goto(site.url)
            page.get_by_label("Admin key").fill(site.key)
            page.keyboard.press("Enter")
            made = page.locator(f'#jobs tr[data-key="{job}"] time')
            made.wait_for(timeout=PATIENCE_S * 1000)
            shown.append((made.inner_text(), made.get_attribute("datetime")))
    assert shown[0][0] != shown[1][0]
    assert shown[0][1] == shown[1][1]


AXE = "async () => (await axe.run({resultTypes: ['violations']})).violations"


def violations(tab: Any, axe: str) -> list[str]:
    """What axe finds, with the place."""
    tab.evaluate(f"() => {{ if (!window.axe) {{ {axe} }} }}")
    return [f"{one['id']}: {one['nodes'][0]['html'][:200]}" for one in tab.evaluate(AXE)]


WIDE = "document.documentElement.scrollWidth > document.documentElement.clientWidth"


def check_everywhere(tab: Any, axe: str) -> None:
    """On a phone and a wide screen, in light and dark."""
    for width in (360, 1280):
        tab.set_viewport_size({"width": width, "height": 800})
        assert not tab.evaluate(WIDE), f"{width} px"
        for scheme in ("light", "dark"):
            tab.emulate_media(color_scheme=scheme)
            assert violations(tab, axe) == [], f"{width} px, {scheme}"


def test_nothing_keeps_anybody_from_using_it(site: Site, tab: Any, axe: str) -> None:
    tab.goto(site.url)
    check_everywhere(tab, axe)
    tab.get_by_label("Admin key").fill(site.key)
    tab.keyboard.press("Enter")
    tab.get_by_text("coordinator workers enrol").wait_for()
    check_everywhere(tab, axe)
    box = site.box("a-worker-with-a-very-long-name-that-has-to-wrap-somewhere-on-a-phone", "chat", labels={"room": "x"})
    site.box("held", "chat", accepting=False, reason="Paused by its owner")
    job = failed_job(site, box, "chat")
    site.submit("waits-" + "m" * 60)
    request = ask_to_join(site, "somebody")
    row = tab.locator(f'#jobs tr[data-key="{job}"]')
    row.get_by_text("Out of ideas.").wait_for()
    row.locator("summary").click()
    row.get_by_text("1: failed on").wait_for()
    tab.get_by_role("article", name="Worker held").locator("summary").click()
    tab.locator("#pending").get_by_text("somebody").wait_for()
    check_everywhere(tab, axe)
    tab.get_by_role("button", name="Revoke held").click()
    tab.get_by_role("dialog").wait_for()
    check_everywhere(tab, axe)
    confirm(tab, "Keep as it is")
    site.admin.post(f"/v1/registrations/{request}/reject", json={})


def test_what_the_fleet_is_told_to_serve_is_shown_with_why_not(site: Site, signed: Any, axe: str) -> None:
    signed.get_by_text("The fleet is not told what to serve").wait_for()
    box = site.box("may-serve", deploys=True)
    site.box("may-not", "chat")
    asked = {"source": "https://models.example/a-model-of-a-long-name.gguf", "sha256": "a" * 64, "replicas": 2}
    assert site.admin.put("/v1/deployments/talk", json=asked).status_code == 201
    row = signed.locator('#deployments tr[data-key="talk"]')
    row.get_by_text("the worker fetches, loads and proves it").wait_for()
    order = box.heard(wire.Order)
    box.raw.send(wire.OrderDone(id=order.id, ok=False, message=f"The disk is full. {EVIL}"))
    row.get_by_text("The disk is full.").wait_for()
    assert row.locator('[data-word="Wanted"]').inner_text() == "2"
    assert row.locator('[data-word="Ready"]').inner_text() == "0"
    row.locator("summary").click()
    row.get_by_text("its owner does not let a coordinator deploy there").first.wait_for()
    assert signed.locator("#deployments img").count() == 0
    check_everywhere(signed, axe)
    assert site.admin.delete("/v1/deployments/talk").status_code == 202
    box.leave()


def test_what_is_said_moves_nothing(site: Site, signed: Any) -> None:
    site.box("still", "chat")
    button = signed.get_by_role("button", name="Pause still")
    before = button.bounding_box()
    signed.context.set_offline(True)
    signed.get_by_text("Connection lost, retrying").wait_for()
    assert button.bounding_box() == before
    signed.context.set_offline(False)
