"""The command itself, as a real process: standalone, embedded, keys, refusals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from coordinator.cli.main import main

START_S = 60.0
END_S = 60.0
TOKEN = "a-token-of-this-boot-only"


@contextlib.contextmanager
def process(*arguments: str, pass_fds: tuple[int, ...] = ()) -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(
        [sys.executable, "-m", "coordinator", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=pass_fds,
    )
    try:
        yield child
    finally:
        child.kill()
        child.wait(END_S)
        for pipe in (child.stdin, child.stdout, child.stderr):
            assert pipe
            pipe.close()


class Embedded:
    """A coordinator as the supervisor starts it."""

    def __init__(self, child: subprocess.Popen[bytes], ready: dict[str, Any]) -> None:
        self.child = child
        self.ready = ready
        self.url: str = ready["url"]
        key = Path(ready["client_key_file"]).read_text().strip()
        self.headers = {"authorization": f"Bearer {key}"}

    def tell(self, line: bytes) -> None:
        assert self.child.stdin
        self.child.stdin.write(line)
        self.child.stdin.flush()


@contextlib.contextmanager
def embedded(state: Path) -> Iterator[Embedded]:
    listener = socket.create_server(("127.0.0.1", 0))
    read_end, write_end = os.pipe()
    os.write(write_end, TOKEN.encode())
    os.close(write_end)
    arguments = ["--fd", str(listener.fileno()), "--worker-token-fd", str(read_end), "--state", str(state)]
    with process("serve", *arguments, pass_fds=(listener.fileno(), read_end)) as child:
        listener.close()
        os.close(read_end)
        assert child.stdout
        yield Embedded(child, json.loads(child.stdout.readline()))


def test_the_embedded_form(tmp_path: Path) -> None:
    with embedded(tmp_path) as it:
        assert it.ready["ready"] is True
        assert it.ready["pid"] == it.child.pid
        assert Path(it.ready["client_key_file"]) == tmp_path / "client.key"
        assert httpx.get(it.url + "/v1/models", headers=it.headers).json()["data"] == []
        # The worker token came by the pipe, so no file holds one.
        assert not (tmp_path / "worker.token").exists()
        upgrade = {"connection": "upgrade", "upgrade": "websocket", "sec-websocket-version": "13"}
        upgrade |= {"sec-websocket-key": "AAAAAAAAAAAAAAAAAAAAAA==", "sec-websocket-protocol": "bulkhead.v1"}
        refused = httpx.get(it.url + "/v1/worker", headers={**upgrade, "authorization": "Bearer wrong-token"})
        assert refused.status_code == 401
        with httpx.stream("GET", it.url + "/v1/worker", headers={**upgrade, "authorization": f"Bearer {TOKEN}"}) as it2:
            assert it2.status_code == 101
        assert it.child.stdin
        it.child.stdin.close()
        assert it.child.wait(END_S) == 0
        assert it.child.stdout
        assert it.child.stdout.read() == b""


def test_a_drain_refuses_new_jobs_and_says_when_to_come_again(tmp_path: Path) -> None:
    with embedded(tmp_path) as it:
        it.tell(b"drain\n")
        end = time.monotonic() + END_S
        while httpx.get(it.url + "/healthz").json() != {"status": "draining"}:
            assert time.monotonic() < end
        body = {"kind": "command", "model": "m", "wait_for_worker": True}
        answer = httpx.post(it.url + "/v1/jobs", json=body, headers=it.headers)
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0
        assert httpx.get(it.url + "/v1/jobs", headers=it.headers).status_code == 200
        it.child.terminate()
        assert it.child.wait(END_S) == 0


def test_requests_that_wait_are_answered_when_the_supervisor_is_gone(tmp_path: Path) -> None:
    with embedded(tmp_path) as it:
        body = {"kind": "command", "model": "m", "wait_for_worker": True, "wait": True}
        answers: list[httpx.Response] = []
        with httpx.Client(base_url=it.url, headers=it.headers, timeout=END_S) as http:
            waiting = threading.Thread(target=lambda: answers.append(http.post("/v1/jobs", json=body)))
            waiting.start()
            deadline = time.monotonic() + END_S
            while not httpx.get(it.url + "/v1/jobs", headers=it.headers).json()["data"]:
                assert time.monotonic() < deadline
            assert it.child.stdin
            it.child.stdin.close()
            waiting.join(END_S)
            assert it.child.wait(END_S) == 0
        assert answers[0].status_code == 503
        assert answers[0].json()["error"]["code"] == "overloaded"
        assert int(answers[0].headers["retry-after"]) > 0


def test_standalone_makes_its_keys_once_and_stops_on_a_signal(tmp_path: Path) -> None:
    keys = []
    for _ in range(2):
        with process("serve", "--listen", "127.0.0.1:0", "--state", str(tmp_path)) as child:
            assert child.stdout
            line = child.stdout.readline().decode()
            assert line.startswith("Serving http://127.0.0.1:")
            url = line.split()[1]
            for name in ("client.key", "worker.token"):
                assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
            keys.append((tmp_path / "client.key").read_text().strip())
            assert httpx.get(url + "/models", headers={"authorization": f"Bearer {keys[-1]}"}).status_code == 200
            child.send_signal(signal.SIGINT)
            assert child.wait(END_S) == 0
    assert keys[0] == keys[1]


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    config = tmp_path / "coordinator.toml"
    config.write_text("config_version = 1\ndrain_s = 600\n")
    with process("serve", "--listen", "127.0.0.1:0", "--state", str(tmp_path), "--config", str(config)) as child:
        assert child.stdout
        url = child.stdout.readline().split()[1].decode()
        headers = {"authorization": f"Bearer {(tmp_path / 'client.key').read_text().strip()}"}
        body = {"kind": "command", "model": "m", "wait_for_worker": True}
        job = httpx.post(url + "/jobs", json=body, headers=headers).json()["id"]
        with httpx.stream("GET", f"{url}/jobs/{job}/events", headers=headers) as answer:
            pieces = answer.iter_text()  # dropping the iterator would close the connection
            next(pieces)
            child.terminate()
            # It waits for this request, for ten minutes, so only the second signal can end it now.
            deadline = time.monotonic() + END_S
            while httpx.get(url.removesuffix("/v1") + "/healthz").json()["status"] != "draining":
                assert time.monotonic() < deadline
            child.terminate()
            assert child.wait(END_S) == 1


def test_tls(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(cert), "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1"]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl, which makes the certificate of this test, is not installed")
    arguments = ["--state", str(tmp_path / "s"), "--tls-cert", str(cert), "--tls-key", str(key)]
    with process("serve", "--listen", "0.0.0.0:0", *arguments) as child:
        assert child.stdout
        url = child.stdout.readline().split()[1].decode().removesuffix("/v1")
        assert url.startswith("https://127.0.0.1:")
        import ssl

        context = ssl.create_default_context(cafile=str(cert))
        assert httpx.get(url + "/healthz", verify=context).json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["serve", "--listen", "0.0.0.0:0"], 78, "--tls-cert"),
        (["serve", "--listen", "nowhere"], 78, "HOST:PORT"),
        (["serve", "--tls-cert", "x"], 78, "belong together"),
        (["serve", "--fd", "0"], 78, "belong together"),
        (["serve", "--config", "/does/not/exist.toml"], 78, "No such file"),
        (["serve", "--frob"], 64, "--frob"),
        (["keys", "create", "--scope", "root"], 64, "root"),
        (["keys", "create", "--scope", "client", "--worker", "w"], 78, "--scope worker"),
        (["keys", "revoke", "bhc_nothing"], 78, "No live key"),
        ([], 64, "COMMAND"),
    ],
)
def test_refusals_name_the_cure(
    arguments: list[str],
    code: int,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path))
    try:
        result = main(arguments)
    except SystemExit as ending:
        result = int(ending.code or 0)
    assert result == code
    assert words in capsys.readouterr().err


def test_a_second_coordinator_over_one_state_folder(tmp_path: Path) -> None:
    arguments = ["serve", "--listen", "127.0.0.1:0", "--state", str(tmp_path)]
    with process(*arguments) as first:
        assert first.stdout
        first.stdout.readline()
        with process(*arguments) as second:
            assert second.wait(START_S) == 73
            assert second.stderr
            assert str(tmp_path).encode() in second.stderr.read()


def test_the_life_of_a_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = ["--state", str(tmp_path)]
    assert main(["keys", "create", "--scope", "client", "--name", "laptop", *state]) == 0
    secret = capsys.readouterr().out.strip()
    assert secret.startswith("bhc_")
    assert main(["keys", "list", *state]) == 0
    listing = capsys.readouterr().out
    assert secret not in listing
    assert f"{secret[:12]}  client  default  live" in listing
    assert main(["keys", "revoke", secret[:12], *state]) == 0
    assert capsys.readouterr().out == f"Revoked {secret[:12]} (client, laptop).\n"
    main(["keys", "list", *state])
    assert "revoked" in capsys.readouterr().out


def test_lists_can_be_read_by_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = ["--state", str(tmp_path)]
    main(["keys", "create", "--scope", "client", "--name", "mine", "--models", "a,b", *state])
    secret = capsys.readouterr().out.split()[-1]
    main(["tenants", "set", "acme", "--weight", "2", *state])
    main(["workers", "enrol", "--name", "box7", *state])
    capsys.readouterr()
    found = {}
    for words in (["keys", "list"], ["tenants", "list"], ["workers", "tokens"], ["registrations", "list"]):
        assert main([*words, "--json", *state]) == 0
        out = capsys.readouterr().out
        assert secret not in out
        found[words[0]] = json.loads(out)
    assert [(key["name"], key["models"]) for key in found["keys"]] == [("mine", ["a", "b"])]
    assert ("acme", 2.0) in [(one["name"], one["weight"]) for one in found["tenants"]]
    assert [one["worker"] for one in found["workers"]] == ["box7"]
    assert found["registrations"] == []
