"""What the doctor looks at on the way to the coordinator, over real sockets."""

from __future__ import annotations

import email.utils
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from supervisor import doctor_link
from supervisor.config import load
from supervisor.doctor import Finding, Patient


class Server:
    """Answers every request with this Date; one that is not HTTP when it is None."""

    def __init__(self) -> None:
        self.ahead_s: float | None = 0.0
        self.paths: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _address = self._listener.accept()
            except OSError:
                return
            with connection:
                asked = connection.recv(65536)
                self.paths.append(asked.split(b" ")[1].decode() if asked.startswith(b"GET") else "")
                if self.ahead_s is None:
                    connection.sendall(b"SSH-2.0-nothing\r\n")
                    continue
                stamp = email.utils.formatdate(time.time() + self.ahead_s, usegmt=True)
                connection.sendall(f"HTTP/1.1 426 No\r\nDate: {stamp}\r\nContent-Length: 0\r\n\r\n".encode())

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(60)


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def patient(folder: Path, url: str, **more: object) -> Patient:
    (folder / "token").write_text("t")
    (folder / "token").chmod(0o600)
    lines = f'[coordinator]\nurl = "{url}"\n' + ("" if url == "embedded" else 'token_file = "token"\n')
    (folder / "worker.toml").write_text(lines)
    return Patient(folder / "worker.toml", load(folder / "worker.toml", {}), folder, environ={})._replace(**more)


def found(who: Patient) -> dict[str, Finding]:
    return {finding.name: finding for finding in doctor_link.coordinator(who)}


def test_a_coordinator_that_answers_whatever_it_says(server, tmp_path):
    seen = found(patient(tmp_path, f"ws://127.0.0.1:{server.port}/prefix"))
    assert {name: finding.verdict for name, finding in seen.items()} == {
        "token": "ok",
        "coordinator address": "ok",
        "coordinator clock": "ok",
    }
    assert server.paths == ["/prefix/v1/worker"]


@pytest.mark.parametrize(("ahead_s", "word"), [(3600, "ahead of"), (-3600, "behind")])
def test_another_time_over_there(server, tmp_path, ahead_s, word):
    server.ahead_s = ahead_s
    clock = found(patient(tmp_path, f"ws://127.0.0.1:{server.port}"))["coordinator clock"]
    assert clock.verdict == "warn"
    assert word in clock.sentence


def test_nobody_there_and_somebody_else_there(server, tmp_path):
    with socket.socket() as deaf:  # it has the port, and does not listen
        deaf.bind(("127.0.0.1", 0))
        nobody = found(patient(tmp_path, f"ws://127.0.0.1:{deaf.getsockname()[1]}"))
    assert nobody["coordinator address"].verdict == "fail"
    server.ahead_s = None
    other_one = found(patient(tmp_path, f"ws://127.0.0.1:{server.port}"))["coordinator address"]
    assert (other_one.verdict, bool(other_one.cure)) == ("fail", True)
    no_tls = found(patient(tmp_path, f"wss://127.0.0.1:{server.port}"))
    assert no_tls["coordinator address"].verdict == "fail"


def test_a_certificate_that_is_refused_and_one_that_ends(tmp_path, monkeypatch):
    def refused(*_args: object) -> None:
        error = ssl.SSLCertVerificationError("certificate verify failed")
        error.verify_message = "self-signed certificate"
        raise error

    monkeypatch.setattr(doctor_link, "_asked", refused)
    tls = found(patient(tmp_path, "wss://coordinator.example"))["coordinator TLS"]
    assert (tls.verdict, "self-signed" in tls.sentence, "tls_ca" in tls.cure) == ("fail", True, True)
    for days, verdict in ((5.5, "warn"), (100.5, "ok"), (-2.0, "warn")):
        end = time.strftime("%b %d %H:%M:%S %Y GMT", time.gmtime(time.time() + days * 86_400))
        monkeypatch.setattr(doctor_link, "_asked", lambda *_args, end=end: (None, {"notAfter": end}))
        assert found(patient(tmp_path, "wss://coordinator.example"))["coordinator TLS"].verdict == verdict


def test_a_token_that_others_can_read_is_a_failure(server, tmp_path):
    who = patient(tmp_path, f"ws://127.0.0.1:{server.port}")
    (tmp_path / "token").chmod(0o644)
    token = found(who)["token"]
    assert (token.verdict, "chmod 600" in token.sentence) == ("fail", True)


def test_what_a_running_supervisor_knows_counts(tmp_path):
    link = {"url": "ws://user:secret@127.0.0.1:1", "connected": True}
    seen = found(patient(tmp_path, "embedded", seen={"link": link}))["coordinator"]
    assert (seen.verdict, "secret" in seen.sentence) == ("ok", False)
    lost = found(patient(tmp_path, "embedded", seen={"link": {"connected": False, "reason": "no route"}}))
    assert (lost["coordinator"].verdict, "no route" in lost["coordinator"].sentence) == ("fail", True)
    assert found(patient(tmp_path, "embedded")) == {}
    assert list(doctor_link.coordinator(Patient(None, None, tmp_path))) == []


def test_the_port_of_the_embedded_coordinator(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        (tmp_path / "worker.toml").write_text(f'[coordinator]\nlisten = "127.0.0.1:{number}"\n')
        who = Patient(None, load(tmp_path / "worker.toml", {}), tmp_path)
        (port,) = doctor_link.port(who)
        assert (port.verdict, str(number) in port.sentence) == ("fail", True)
    (tmp_path / "worker.toml").write_text('[coordinator]\nlisten = "[::1]:0"\n')
    (port,) = doctor_link.port(Patient(None, load(tmp_path / "worker.toml", {}), tmp_path))
    assert port.verdict == "ok"
    assert list(doctor_link.port(patient(tmp_path, "ws://127.0.0.1:1"))) == []
