"""The dashboard's routes, with raw requests: who is let in, who is kept out, and when it ends."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from coordinator.dashboard import sessions
from coordinator.dashboard.routes import Dashboard
from coordinator.testing import FakeWorker, Running, running
from protocol.link_wire import ModelOffer

PATIENCE_S = 60
SECRET_PROMPT = "the password of the vault"
SECRET_ANSWER = "it is under the mat"


def login(served: Running, key: str, **headers: str) -> httpx.Response:
    sent = {"origin": served.url, **headers}
    return httpx.post(served.url + "/dashboard/login", json={"key": key}, headers=sent)


def test_a_key_becomes_a_cookie_that_no_script_can_read(served: Running, boss: str) -> None:
    answer = login(served, boss)
    assert answer.status_code == 200
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith(f"bulkhead-{served.url.rpartition(':')[2]}=")
    assert cookie.endswith("; Path=/; HttpOnly; SameSite=Strict; Max-Age=43200")
    assert boss not in answer.text + cookie
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"origin": "http://evil.test"}, 403, "forbidden"),
        ({"sec-fetch-site": "cross-site"}, 403, "forbidden"),
        ({"sec-fetch-site": "same-site"}, 403, "forbidden"),
        ({"content-type": "text/plain"}, 415, "unsupported_media_type"),
    ],
)
def test_other_pages_cannot_log_in(served: Running, boss: str, headers: dict[str, str], status: int, code: str) -> None:
    answer = login(served, boss, **headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert "set-cookie" not in answer.headers


def test_keys_that_open_nothing(served: Running) -> None:
    dashboard = dashboard_of(served)
    dashboard.failed._failed.clear()
    for key, status, words in (
        ("bha_" + "a" * 43, 401, "coordinator keys list"),
        ("é", 401, "unknown"),
        (served.key, 403, "--scope admin"),
        (served.worker_token, 403, "--scope admin"),
        ("", 400, "wrong"),
        ("x" * 5000, 413, "exceeds"),
    ):
        answer = login(served, key)
        assert (key[:5], answer.status_code) == (key[:5], status)
        assert words in answer.json()["error"]["message"]
    dashboard.failed._failed.clear()


def dashboard_of(served: Running) -> Dashboard:
    """The routes of a running coordinator."""
    found: Any = served.coordinator.dashboard
    assert isinstance(found, Dashboard)
    return found


def test_wrong_keys_are_bounded(served: Running, boss: str) -> None:
    failed = dashboard_of(served).failed._failed
    failed.clear()
    try:
        for _ in range(sessions.FAILED_MOST):
            assert login(served, "bha_" + "a" * 43).status_code == 401
        answer = login(served, boss)  # even the right one has to wait
        assert (answer.status_code, 1 <= int(answer.headers["retry-after"]) <= 60) == (429, True)
    finally:
        failed.clear()
    assert login(served, boss).status_code == 200


def test_a_session_opens_what_the_page_asks_for_and_nothing_else(browser: httpx.Client) -> None:
    for path in ("/v1/workers", "/v1/registrations", "/v1/admin/jobs", "/v1/keys", "/v1/usage"):
        assert (path, browser.get(path).status_code) == (path, 200)
    for path in ("/v1/jobs", "/v1/models", "/metrics", "/v1/files"):
        assert (path, browser.get(path).status_code) == (path, 401)
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    assert browser.post("/v1/chat/completions", json=body).status_code == 401


def test_neither_half_is_worth_anything_alone(served: Running, browser: httpx.Client, boss: str) -> None:
    page = browser.headers["x-bulkhead-page"]
    assert httpx.get(served.url + "/v1/keys", headers={"x-bulkhead-page": page}).status_code == 401
    assert httpx.get(served.url + "/v1/keys", cookies=dict(browser.cookies)).status_code == 401
    for wrong in ("a" * 43, page[:-1], "", "é"):
        answer = browser.get("/v1/keys", headers={"x-bulkhead-page": wrong.encode()})  # type: ignore[dict-item]
        assert answer.status_code == 401
    other = login(served, boss).json()["page"]  # of another session
    assert browser.get("/v1/keys", headers={"x-bulkhead-page": other}).status_code == 401


def test_every_order_is_refused_that_does_not_come_from_our_page(served: Running, browser: httpx.Client) -> None:
    for headers in ({"origin": "http://evil.test"}, {"sec-fetch-site": "same-site"}, {"origin": "null"}):
        for path in ("/v1/workers/w/drain", "/v1/keys/bha_x/revoke", "/v1/admin/jobs/j/cancel", "/dashboard/logout"):
            answer = browser.post(path, json={}, headers=headers)
            assert (path, answer.status_code) == (path, 403)
    assert browser.get("/v1/keys", headers={"origin": "http://evil.test"}).status_code == 403
    del browser.headers["origin"]
    assert browser.post("/v1/workers/w/drain", json={}).status_code == 403


def test_a_logout_ends_the_session_here_and_in_every_copy(browser: httpx.Client) -> None:
    kept = dict(browser.cookies)
    answer = browser.post("/dashboard/logout")
    assert (answer.status_code, "Max-Age=0" in answer.headers["set-cookie"]) == (200, True)
    assert not dict(browser.cookies)
    browser.cookies.update(kept)
    assert browser.get("/v1/keys").status_code == 401


def test_a_session_ends_with_its_time(tmp_path: Path) -> None:
    with running(tmp_path) as served, httpx.Client(base_url=served.url, timeout=PATIENCE_S) as browser:
        answer = login(served, served.coordinator.keys.create("admin"))
        browser.cookies.update(answer.cookies)
        browser.headers["x-bulkhead-page"] = answer.json()["page"]
        assert browser.get("/v1/keys").status_code == 200
        served.coordinator._store.shift_clock(sessions.SESSION_S * 1000 - 600_000)
        assert browser.get("/v1/keys").status_code == 200
        served.coordinator._store.shift_clock(600_000)
        answer = browser.get("/v1/keys")
        assert (answer.status_code, "open the dashboard again" in answer.json()["error"]["message"]) == (401, True)


def test_a_session_outlives_the_process_that_opened_it(tmp_path: Any) -> None:
    """Whichever replica is asked: nothing of a session is in one process."""
    with running(tmp_path) as first:
        key = first.coordinator.keys.create("admin")
        answer = login(first, key)
    (cookie,) = answer.cookies.values()
    with running(tmp_path) as second:
        headers = {
            "x-bulkhead-page": answer.json()["page"],
            "cookie": f"bulkhead-{second.url.rpartition(':')[2]}={cookie}",
        }
        assert httpx.get(second.url + "/v1/keys", headers=headers).status_code == 200
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert cookie.encode() not in stored
    assert answer.json()["page"].encode() not in stored


# ---- the feed


class Watching:
    """A feed in the hands of a test, read by a thread of its own."""

    def __init__(self, client: httpx.Client, **headers: str) -> None:
        self.text, self.status = "", 0
        self.more, self.ended = threading.Condition(), False
        self._thread = threading.Thread(target=self._read, args=(client, headers), daemon=True)
        self._thread.start()

    def _read(self, client: httpx.Client, headers: dict[str, str]) -> None:
        try:
            with client.stream("GET", "/dashboard/feed", headers=headers) as response:
                self.status = response.status_code
                for piece in response.iter_text():
                    with self.more:
                        self.text += piece
                        self.more.notify_all()
        except Exception as error:  # its client may be closed under it; a test that waits for more looks what there is
            with self.more:
                self.text += f"\n(ended by {error!r})"
        with self.more:
            self.ended = True
            self.more.notify_all()

    def until(self, words: str) -> None:
        """Wait for these words."""
        with self.more:
            assert self.more.wait_for(lambda: words in self.text, PATIENCE_S), self.text[-2000:]

    def until_ended(self) -> None:
        """Wait for the end of the stream."""
        with self.more:
            assert self.more.wait_for(lambda: self.ended, PATIENCE_S)


@pytest.fixture
def watching(browser: httpx.Client) -> Watching:
    return Watching(browser)


def test_the_feed_tells_of_jobs_and_workers_and_never_what_they_say(
    served: Running, watching: Watching, http: httpx.Client
) -> None:
    watching.until("event: snapshot")
    offer = ModelOffer(name="told-model", kinds=("llm",), engine="fake", slots=1)

    def answer(job: Any) -> None:
        job.started()
        job.chunk({"delta": {"content": SECRET_ANSWER}})
        job.complete({"content": SECRET_ANSWER}, {"completion_tokens": 5})

    with FakeWorker(served, (offer,), answer, "told-worker"):
        watching.until('"told-worker"')
        body = {
            "kind": "llm",
            "model": "told-model",
            "params": {"messages": [{"role": "user", "content": SECRET_PROMPT}]},
            "idempotency_key": "not for everybody",
            "wait": True,
        }
        done = http.post("/v1/jobs", json=body).json()
        assert done.get("state") == "succeeded", done
        watching.until(done["id"])
        watching.until('"state":"succeeded"')
    watching.until('"gone":{"workers":["told-worker"]')
    for secret in (SECRET_PROMPT, SECRET_ANSWER, "not for everybody", "params", "result"):
        assert secret not in watching.text


def test_the_feed_ends_with_its_key(served: Running, boss: str, watching: Watching) -> None:
    watching.until("event: snapshot")
    served.coordinator.keys.revoke(boss[:12])
    watching.until_ended()


def test_the_feed_beats_and_ends_with_its_session(
    served: Running, browser: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashboard_of(served), "beat_s", 0.05)
    watching = Watching(browser)
    watching.until(": alive")
    with httpx.Client(base_url=served.url, headers=browser.headers, cookies=browser.cookies) as another_tab:
        assert another_tab.post("/dashboard/logout").status_code == 200
    watching.until_ended()


def test_the_feed_goes_on_behind_what_was_seen(browser: httpx.Client, served: Running) -> None:
    first = Watching(browser)
    first.until("event: snapshot")
    seen = first.text.partition("id: ")[2].partition("\n")[0]
    offer = ModelOffer(name="m", kinds=("llm",), engine="fake")
    with FakeWorker(served, (offer,), lambda job: None, "while-away"):
        first.until("while-away")
        again = Watching(browser, **{"last-event-id": seen})
        again.until("while-away")
        assert "snapshot" not in again.text


def test_who_may_watch(served: Running, http: httpx.Client, boss: str) -> None:
    assert httpx.get(served.url + "/dashboard/feed").status_code == 401
    assert http.get("/dashboard/feed").status_code == 403
    with httpx.Client(base_url=served.url, headers={"authorization": f"Bearer {boss}"}, timeout=PATIENCE_S) as script:
        watching = Watching(script)
        watching.until("event: snapshot")
        assert watching.status == 200


def test_a_coordinator_with_an_open_feed_ends_at_once(tmp_path: Any) -> None:
    """What never ends by itself must not hold up a drain."""
    with running(tmp_path) as served:
        key = served.coordinator.keys.create("admin")
        headers = {"authorization": f"Bearer {key}"}
        with httpx.Client(base_url=served.url, headers=headers, timeout=PATIENCE_S) as script:
            watching = Watching(script)
            watching.until("event: snapshot")
            served.call(served.coordinator.parts.http.wait_idle)  # nothing is waited for

            async def stop() -> None:
                served.coordinator.stop_dispatching()

            served.call(stop)
            watching.until_ended()


def test_a_reader_that_stops_reading_costs_nobody_else(served: Running, browser: httpx.Client) -> None:
    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as deaf:
        cookie = "; ".join(f"{name}={value}" for name, value in browser.cookies.items())
        page = browser.headers["x-bulkhead-page"]
        head = f"GET /dashboard/feed HTTP/1.1\r\nhost: {served.url[7:]}\r\ncookie: {cookie}\r\nx-bulkhead-page: {page}"
        deaf.sendall(head.encode() + b"\r\n\r\n")
        watching = Watching(browser)
        watching.until("event: snapshot")
