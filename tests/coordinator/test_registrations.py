"""Registration of studio workers: requests, polls, decisions, and who tries to get past them."""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from coordinator import registrations as module
from coordinator.access import is_open
from coordinator.cli.main import main
from coordinator.keys import FILE_NAME, Keys
from coordinator.register.schema import MIGRATIONS
from coordinator.registrations import NoRegistration, RegistrationRefusal, Registrations, TooManyPending
from coordinator.studio import routes
from coordinator.studio.routes import MAX_ADDRESSES, Rate
from coordinator.testing import running
from coordinator.testing_studio import capabilities, poll, register
from tests.coordinator.studio_rig import House

KNOWN: dict[str, Any] = {"machine": "box", "user": "me", "models": ["m"]}


class Clock:
    """A time that a test moves."""

    def __init__(self) -> None:
        self.ms = 10**12

    def __call__(self) -> int:
        return self.ms


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(tmp_path: Path, clock: Clock) -> Iterator[Registrations]:
    it = Registrations(tmp_path / FILE_NAME, clock)
    yield it
    it.close()


def secret_hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def ask(registry: Registrations, install: str = "i", address: str = "192.0.2.1", secret: str = "s") -> str:
    return registry.request(install, address, secret_hash(secret), "studio-worker/1", KNOWN)[0]


# ---- the registry ------------------------------------------------------------------------------------------


def test_the_same_installation_at_the_same_address_has_one_pending_request(registry: Registrations) -> None:
    first, created = registry.request("i", "192.0.2.1", secret_hash("s"), "x", KNOWN)
    assert created
    assert first.startswith("rr-")
    assert registry.request("i", "192.0.2.1", secret_hash("s"), "x", KNOWN) == (first, False)
    assert ask(registry, address="192.0.2.2") != first
    assert ask(registry, install="j") != first
    registry.reject(first)
    assert ask(registry) != first


def test_every_approved_poll_makes_a_token_and_ends_the_one_before(registry: Registrations) -> None:
    request = ask(registry)
    polled = registry.poll(request, "s")
    assert polled is not None
    assert (polled.state, polled.token) == ("pending", "")
    worker = registry.approve(request).worker
    assert worker is not None
    assert registry.approve(request).worker == worker
    assert not registry.admits(worker, "")
    tokens = [it.token for _ in range(3) if (it := registry.poll(request, "s"))]
    assert len(set(tokens)) == 3
    assert [registry.admits(worker, token) for token in tokens] == [False, False, True]
    assert not registry.admits("another", tokens[-1])


def test_wrong_secrets_and_unknown_ids_look_alike(registry: Registrations) -> None:
    request = ask(registry)
    registry.approve(request)
    for wrong in ("", "S", "s" * 10_000, secret_hash("s").hex(), "\udc80"):
        assert registry.poll(request, wrong) is None
    assert registry.poll("rr-none", "s") is None


def test_a_rejected_worker_is_put_out_and_stays_out(registry: Registrations) -> None:
    request = ask(registry)
    worker = registry.approve(request).worker or ""
    polled = registry.poll(request, "s")
    assert polled is not None
    registry.reject(request, "sold")
    assert not registry.admits(worker, polled.token)
    assert not registry.knows(worker)
    again = registry.poll(request, "s")
    assert again is not None
    assert (again.state, again.reason, again.token) == ("rejected", "sold", "")
    with pytest.raises(RegistrationRefusal):
        registry.approve(request)
    with pytest.raises(NoRegistration):
        registry.reject("rr-none")


def test_nobody_slips_under_a_request_of_which_the_owner_is_there(registry: Registrations, clock: Clock) -> None:
    request = ask(registry)
    assert ask(registry, secret="thief") == request
    assert registry.poll(request, "thief") is None
    seen = next(registry.list())
    assert seen.secret_begins == secret_hash("s").hex()[:8]
    with pytest.raises(RegistrationRefusal, match="another"):
        registry.approve(request, secret_hash("thief").hex()[:8])
    # Only when its owner has been silent, as after the loss of its secret, somebody else may take it over.
    clock.ms += module.SILENT_MS - 1
    assert registry.poll(request, "s") is not None
    clock.ms += module.SILENT_MS + 1
    assert ask(registry, secret="second") == request
    assert registry.poll(request, "s") is None
    assert registry.poll(request, "second") is not None


def test_too_many_requests_make_no_room_but_for_silent_ones(
    registry: Registrations, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_PENDING", 3)
    first = ask(registry, install="i0")
    for number in (1, 2):
        ask(registry, install=f"i{number}")
    with pytest.raises(TooManyPending):
        ask(registry, install="i3")
    clock.ms += module.SILENT_MS
    registry.poll(first, "s")
    clock.ms += 1
    ask(registry, install="i3")
    assert {one.install for one in registry.list("pending")} == {"i0", "i3"}


def test_no_secret_lies_in_the_file(registry: Registrations, tmp_path: Path) -> None:
    request = ask(registry, secret="a-very-secret-secret")
    registry.approve(request)
    polled = registry.poll(request, "a-very-secret-secret")
    assert polled is not None
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"a-very-secret-secret" not in stored
    assert polled.token.encode() not in stored


def test_the_table_is_added_to_a_file_of_keys_that_is_there(tmp_path: Path) -> None:
    keys = Keys(tmp_path / FILE_NAME)
    secret = keys.create("client")
    for _ in range(2):
        Registrations(tmp_path / FILE_NAME).close()
    assert keys.find(secret) is not None
    keys.close()
    with sqlite3.connect(tmp_path / FILE_NAME) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
    db.close()


def test_many_at_once_make_one_request(tmp_path: Path) -> None:
    found: list[str] = []

    def one() -> None:
        registry = Registrations(tmp_path / FILE_NAME)
        found.append(ask(registry))
        registry.close()

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


# ---- over HTTP ---------------------------------------------------------------------------------------------


def test_from_a_request_to_a_session(house: House) -> None:
    install, secret = f"install-{house.tag}", "5e" * 32
    made = register(house.url, install, secret, capabilities(machineName="\x1b[31mred"))
    assert (made.status_code, made.json()["status"]) == (201, "pending")
    request = made.json()["requestId"]
    assert register(house.url, install, secret, capabilities()).json() == {"requestId": request, "status": "pending"}
    assert poll(house.url, request, secret).json() == {"status": "pending"}
    assert poll(house.url, request, "wrong").status_code == 404
    assert poll(house.url, "rr-none", secret).status_code == 404
    assert httpx.get(f"{house.url}/graphics/api/workers/register-requests/{request}").status_code == 401
    listed = house.admin.get("/v1/registrations?state=pending").json()["data"]
    (one,) = [item for item in listed if item["id"] == request]
    assert (one["address"], one["user"], one["agent"]) == ("127.0.0.1", "someone", "studio-worker/0.4.5")
    approved = house.admin.post(f"/v1/registrations/{request}/approve").json()
    answer = poll(house.url, request, secret)
    assert answer.json()["workerId"] == approved["worker"]
    assert answer.headers["cache-control"] == "no-store"
    house.admin.post(f"/v1/registrations/{request}/reject", json={"reason": "sold"})
    assert poll(house.url, request, secret).json() == {"status": "rejected", "reason": "sold"}


@pytest.mark.parametrize(
    "change",
    [
        {"installId": "../../etc/passwd"},
        {"installId": ""},
        {"installId": "x" * 200},
        {"installId": 5},
        {"installId": "a\0b"},
        {"registrationSecretHash": "5e"},
        {"registrationSecretHash": "zz" * 32},
        {"registrationSecretHash": "5e" * 32 + "\n"},
        {"capabilities": []},
        {"capabilities": {"vramTotalGb": -1}},
        {"capabilities": {"supportedModels": ["x"] * 5000}},
        {"userAgent": "x" * 1000},
    ],
)
def test_requests_that_are_wrong_are_refused_by_name(house: House, change: dict[str, Any]) -> None:
    body = {"installId": "i", "registrationSecretHash": "5e" * 32, "capabilities": {}, "userAgent": "x", **change}
    answer = httpx.post(f"{house.url}/graphics/api/workers/register-request", json=body)
    assert answer.status_code == 400
    assert next(iter(change)) in answer.json()["error"]["message"]


def test_a_request_beyond_all_bounds_is_refused(house: House) -> None:
    url = f"{house.url}/graphics/api/workers/register-request"
    headers = {"content-type": "application/json"}
    assert httpx.post(url, content=b'{"x":"' + b"y" * 2**20 + b'"}', headers=headers).status_code == 413
    assert httpx.post(url, content=b"[" * 100_000, headers=headers).status_code == 400


def test_only_an_admin_decides(house: House) -> None:
    for path in ("/v1/registrations", "/v1/registrations/rr-x/approve", "/v1/registrations/rr-x/reject"):
        ask_by = house.client.get if path.endswith("s") else house.client.post
        assert ask_by(path).status_code == 403
    assert house.admin.post("/v1/registrations/rr-x/approve").status_code == 404
    assert house.admin.post("/v1/registrations/rr-x/reject").status_code == 404
    assert house.admin.get("/v1/registrations?state=silly").status_code == 400


def test_a_hundred_requests_from_one_address_are_ten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "Rate", lambda _now, calls: Rate(lambda: 0.0, calls))  # however long a hundred take
    with running(tmp_path) as there, httpx.Client() as client:
        url = f"{there.url}/graphics/api/workers/register-request"
        statuses = []
        for number in range(100):
            body = {"installId": f"i{number}", "registrationSecretHash": "5e" * 32, "capabilities": {}}
            answer = client.post(url, json=body)
            statuses.append(answer.status_code)
        assert statuses == [201] * 10 + [429] * 90
        assert answer.headers["retry-after"] == "61"


def test_the_rate_is_counted_by_network_and_forgets() -> None:
    now = 0.0
    rate = Rate(lambda: now, 2, 60.0)
    assert [rate.wait("192.0.2.1") for _ in range(3)] == [0.0, 0.0, 60.0]
    assert rate.wait("192.0.2.2") == 0.0
    assert [rate.wait(f"2001:db8::{n}") for n in range(3)] == [0.0, 0.0, 60.0]
    assert rate.wait("2001:db8:1::1") == 0.0
    assert [rate.wait(f"::ffff:192.0.2.{n}") for n in range(3)] == [0.0, 0.0, 0.0]
    now = 60.0
    assert rate.wait("192.0.2.1") == 0.0
    for number in range(MAX_ADDRESSES + 10):
        rate.wait(f"x{number}")
    assert len(rate._seen) == MAX_ADDRESSES


@pytest.mark.parametrize(
    ("path", "opened"),
    [
        ("/graphics/api/workers/register-request", True),
        ("/a/b/graphics/api/workers/register-requests/rr-1", True),
        ("/graphics/api/workers/w/jobs/j/complete", True),
        ("/graphics/api/blobs/blob_x", True),
        ("/graphics/api/workers", False),
        ("/graphics/api/workers/w/jobs/j/complete/x", False),
        ("/v1/jobs", False),
        ("/v1/registrations", False),
        ("//graphics/api/workers/register-request", False),
        ("/../graphics/api/workers/register-request", False),
    ],
)
def test_what_is_open_without_a_key(path: str, opened: bool) -> None:
    assert is_open(path) is opened


# ---- on the command line -----------------------------------------------------------------------------------


def test_the_command_lists_approves_and_rejects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    registry = Registrations(tmp_path / FILE_NAME)
    hostile = {"machine": "\x1b[31mred\nline", "user": "me", "models": []}
    request, _ = registry.request("i", "192.0.2.1", secret_hash("s"), "x", hostile)
    state = ["--state", str(tmp_path)]
    assert main(["registrations", "list", *state]) == 0
    shown = capsys.readouterr().out
    assert request in shown
    assert "pending" in shown
    assert "\x1b" not in shown
    assert len(shown.splitlines()) == 2
    assert main(["registrations", "approve", request, "--secret", "00000000", *state]) == 78
    assert main(["registrations", "approve", request, *state]) == 0
    polled = registry.poll(request, "s")
    assert polled is not None
    assert polled.worker in capsys.readouterr().out
    assert main(["registrations", "reject", request, "--reason", "sold", *state]) == 0
    assert main(["registrations", "list", "--state-is", "rejected", *state]) == 0
    assert "sold" in capsys.readouterr().out
    assert main(["registrations", "reject", "rr-none", *state]) == 78
    registry.close()
