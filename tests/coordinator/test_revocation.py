"""A key that is revoked beside the server: sessions and answers end. What keys and tenants may, over HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from coordinator.cli.main import main
from coordinator.enrolments import Enrolments
from coordinator.keys import FILE_NAME, Keys, digest
from coordinator.registrations import Registrations
from coordinator.tenants import Tenants
from coordinator.testing import FakeWorker, OfferedJob, Running
from protocol import link_wire as wire
from protocol.link_wire import ModelOffer
from protocol.revision import LINK_SUBPROTOCOL, LINK_WIRE

WAIT_S = 60.0  # it takes less than a second on a machine that is idle
Serve = Callable[..., FakeWorker]


@pytest.fixture
def beside(served: Running) -> Iterator[Keys]:
    """The register as the command beside the server opens it."""
    keys = Keys(Path(served.coordinator.keys.known.register._path).parent / FILE_NAME)  # type: ignore[attr-defined]
    yield keys
    keys.close()


def client(served: Running, secret: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=served.url + "/v1", api_key=secret, max_retries=0, timeout=WAIT_S)


def end_of(socket: ClientConnection) -> ConnectionClosed:
    """Read to the end."""
    while True:
        try:
            socket.recv(WAIT_S)
        except ConnectionClosed as closed:
            return closed


def one_token(job: OfferedJob) -> None:
    job.started()
    job.chunk({"text": "hi"})
    job.complete({"text": "hi", "finish_reason": "stop"}, {"prompt_tokens": 1, "completion_tokens": 1})


def test_a_worker_whose_token_is_revoked_is_put_out(served: Running, beside: Keys) -> None:
    secret = beside.create("worker", worker="put-out")
    headers = {"authorization": f"Bearer {secret}"}
    address = served.url.replace("http", "ws") + "/v1/worker"
    with connect(address, subprotocols=[LINK_SUBPROTOCOL], additional_headers=headers) as socket:  # type: ignore[list-item]
        hello = wire.Hello(worker="put-out", low=LINK_WIRE.low, high=LINK_WIRE.high, capabilities=wire.Capabilities())
        socket.send(wire.encode(hello))
        socket.recv(WAIT_S)  # welcome
        beside.revoke(secret[:12])
        closed = end_of(socket)
        assert closed.rcvd is not None
        assert closed.rcvd.code == wire.CLOSE_AUTH == 4001
    with pytest.raises(InvalidStatus) as refused:
        connect(address, subprotocols=[LINK_SUBPROTOCOL], additional_headers=headers)  # type: ignore[list-item]
    assert refused.value.response.status_code == 401


def test_answers_on_their_way_end_with_their_key(served: Running, beside: Keys, serve: Serve) -> None:
    going, stop = threading.Semaphore(0), threading.Event()

    def endless(job: OfferedJob) -> None:
        job.started()
        job.chunk({"text": "hi"})
        going.release()
        assert job.cancelled.wait(WAIT_S) or stop.is_set()

    serve(endless, "revoked-model", "llm")
    secret = beside.create("client", name="leaver")
    headers = {"authorization": f"Bearer {secret}"}
    body = {"model": "revoked-model", "messages": [{"role": "user", "content": "x"}]}
    url = served.url + "/v1/chat/completions"
    answers: list[httpx.Response] = []
    waiting = threading.Thread(
        target=lambda: answers.append(httpx.post(url, json=body, headers=headers, timeout=WAIT_S))
    )
    waiting.start()
    try:
        with httpx.stream("POST", url, json={**body, "stream": True}, headers=headers, timeout=WAIT_S) as stream:
            for _ in range(2):
                assert going.acquire(timeout=WAIT_S)
            beside.revoke(secret[:12])
            lines = [line for line in stream.iter_lines() if line.startswith("data: ")]
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "unauthorized"
        assert "[DONE]" not in lines[-1]
        waiting.join(WAIT_S)
        assert answers[0].status_code == 401
        assert answers[0].json()["error"]["message"] == "The API key was revoked."
    finally:
        stop.set()
    assert httpx.get(served.url + "/v1/models", headers=headers).status_code == 401


def test_an_official_client_reads_the_limits(served: Running, beside: Keys, serve: Serve) -> None:
    serve(one_token, "limited-model", "llm")
    secret = beside.create("client", rpm=2)
    with client(served, secret) as ai:
        for left in (1, 0):
            raw = ai.chat.completions.with_raw_response.create(
                model="limited-model", messages=[{"role": "user", "content": "x"}]
            )
            assert raw.headers["x-ratelimit-limit-requests"] == "2"
            assert raw.headers["x-ratelimit-remaining-requests"] == str(left)
            assert raw.headers["x-ratelimit-reset-requests"].endswith("s")
        with pytest.raises(openai.RateLimitError) as caught:
            ai.chat.completions.create(model="limited-model", messages=[{"role": "user", "content": "x"}])
        headers = caught.value.response.headers
        assert 1 <= int(headers["retry-after"]) <= 30
        assert (headers["x-ratelimit-remaining-requests"], headers["x-should-retry"]) == ("0", "true")
        assert caught.value.code == "rate_limited"
        assert caught.value.type == "rate_limit_error"
        assert ai.models.list()  # looking is free


def test_models_that_a_key_may_not_use_are_not_there_for_it(served: Running, beside: Keys, serve: Serve) -> None:
    for name in ("allowed-model", "secret-model"):
        serve(one_token, name, "llm")
    secret = beside.create("client", models=["allowed-model", "other"])
    with client(served, secret) as ai:
        assert [model.id for model in ai.models.list()] == ["allowed-model"]
        assert ai.models.retrieve("allowed-model").id == "allowed-model"
        with pytest.raises(openai.NotFoundError):
            ai.models.retrieve("secret-model")
        for name in ("secret-model", "no-such-model"):  # which of them exists is not told
            with pytest.raises(openai.PermissionDeniedError, match="may not use the model"):
                ai.chat.completions.create(model=name, messages=[{"role": "user", "content": "x"}])
        ai.chat.completions.create(model="allowed-model", messages=[{"role": "user", "content": "x"}])
    headers = {"authorization": f"Bearer {secret}"}
    job = {"kind": "llm", "model": "secret-model", "params": {"prompt": "x"}, "wait_for_worker": True}
    assert httpx.post(served.url + "/v1/jobs", json=job, headers=headers).status_code == 403


def test_a_tenant_has_no_more_jobs_open_than_it_may(served: Running, beside: Keys) -> None:
    Tenants(beside.known).set("few", concurrent=2, weight=2.0)
    secret = beside.create("client", tenant="few")
    headers = {"authorization": f"Bearer {secret}"}
    job = {"kind": "llm", "model": "nobody-serves-it", "params": {"prompt": "x"}, "wait_for_worker": True}
    with httpx.Client(base_url=served.url, headers=headers, timeout=WAIT_S) as http:
        made = [http.post("/v1/jobs", json=job) for _ in range(3)]
        assert [answer.status_code for answer in made] == [202, 202, 429]
        assert made[2].headers["retry-after"] == "2"
        assert "may have 2 jobs" in made[2].json()["error"]["message"]
        http.post(f"/v1/jobs/{made[0].json()['id']}/cancel")
        last = http.post("/v1/jobs", json=job)
        assert last.status_code == 202
        for answer in (made[1], last):
            http.post(f"/v1/jobs/{answer.json()['id']}/cancel")


def test_enrolment_over_http(served: Running, beside: Keys) -> None:
    tokens, url = Enrolments(beside.known), served.url + "/v1/workers/enrol"
    token = tokens.create(60, worker="box9")
    headers = {"authorization": f"Bearer {token}"}
    assert httpx.post(url).status_code == 401
    assert httpx.post(url, headers=headers, json={"worker": 5}).status_code == 400
    assert httpx.post(url, headers=headers, content=b"{").status_code == 400
    done = httpx.post(url, headers=headers)
    assert done.status_code == 201
    assert done.headers["cache-control"] == "no-store"
    assert done.json()["worker"] == "box9"
    second = httpx.post(url, headers=headers)
    assert second.status_code == 401
    assert "used before" in second.json()["error"]["message"]
    with FakeWorker(
        Running(served.url, served.key, done.json()["token"], served.coordinator, served.loop),
        (ModelOffer(name="enrolled", kinds=("llm",), engine="fake", slots=1),),
        one_token,
        "box9",
    ):
        with client(served, served.key) as ai:
            ai.chat.completions.create(model="enrolled", messages=[{"role": "user", "content": "x"}])
    # A key opens nothing but the gateway, and a token nothing but this route.
    for secret in (done.json()["token"], token):
        answer = httpx.get(served.url + "/v1/models", headers={"authorization": f"Bearer {secret}"})
        assert answer.status_code in (401, 403)


def test_a_request_to_be_admitted_over_http(served: Running, beside: Keys) -> None:
    url = served.url + "/v1/workers/enrol/requests"
    asked = {"worker": "asker", "secret_sha256": digest("my secret").hex(), "machine": "box"}
    for wrong in ({}, {**asked, "worker": "../x"}, {**asked, "secret_sha256": "x"}, {**asked, "more": 1}):
        assert httpx.post(url, json=wrong).status_code == 400
    made = httpx.post(url, json=asked)
    assert (made.status_code, made.json()["status"]) == (201, "pending")
    assert httpx.post(url, json=asked).status_code == 200
    mine, other = {"authorization": "Bearer my secret"}, {"authorization": "Bearer another"}
    at = f"{url}/{made.json()['id']}"
    assert httpx.get(at, headers=mine).json() == {"status": "pending"}
    assert httpx.get(at, headers=other).status_code == 404
    assert httpx.get(at).status_code == 404
    Registrations(beside.known).approve(made.json()["id"])
    found = httpx.get(at, headers=mine).json()
    assert (found["status"], found["worker"]) == ("approved", "asker")
    assert beside.find(found["token"]) is not None
    assert httpx.post(served.url + "/v1/workers/enrol/pause").status_code == 401  # a worker that is named so


@pytest.mark.parametrize(
    "secret", ["x" * 8000, "bhc_" + "a" * 44, "bhc_" + "\u0430" * 43, "bhc_" + "a" * 42 + "\u212a", "bhc_%00"]
)
def test_odd_secrets_are_unknown(served: Running, secret: str) -> None:
    header = b"Bearer " + secret.encode()
    assert httpx.get(served.url + "/v1/models", headers={"authorization": header}).status_code == 401


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = ["--state", str(tmp_path)]
    limits = ["--rpm", "60", "--concurrent", "4", "--models", "a, b"]
    assert main(["keys", "create", "--scope", "client", "--name", "team", *limits, *state]) == 0
    secret = capsys.readouterr().out.strip()
    assert main(["keys", "list", *state]) == 0
    assert "60/min, 4 at once, only a,b" in capsys.readouterr().out
    assert main(["tenants", "set", "acme", "--weight", "2", "--store-content", "no", "--rpm", "600", *state]) == 0
    assert main(["tenants", "set", "acme", "--models", "a", *state]) == 0
    assert main(["tenants", "set", "acme", "--models", "", *state]) == 0
    capsys.readouterr()
    assert main(["tenants", "list", *state]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:]] == [["acme", "2", "no", "600/min"], ["default", "1", "yes", "-"]]
    assert main(["workers", "enrol", "--name", "box7", "--expires", "1h", *state]) == 0
    token = capsys.readouterr().out.strip()
    assert token.startswith("bhe_")
    assert main(["workers", "tokens", *state]) == 0
    assert "open" in capsys.readouterr().out
    assert main(["workers", "revoke-token", token[:12], *state]) == 0
    assert main(["workers", "revoke-token", token[:12], *state]) == 78
    assert main(["tenants", "set", "acme", "--weight", "0", *state]) == 78
    assert main(["workers", "enrol", "--name", "a b", *state]) == 78
    for wrong in (["tenants", "set", "a", "--rpm", "-1"], ["workers", "enrol", "--expires", "1y"]):
        with pytest.raises(SystemExit) as left:
            main([*wrong, *state])
        assert left.value.code == 64
    acts = Keys(tmp_path / FILE_NAME)
    rows = acts.known.register.read("SELECT who, what FROM acts ORDER BY number")
    acts.close()
    assert all("@" in row["who"] for row in rows)
    said = "\n".join(row["what"] for row in rows)
    assert f"made the key {secret[:12]} (client, tenant 'default', name 'team')" in said
    assert secret not in said
    assert token not in said
