"""What Sentry is told. With the SDK installed, a stand-in server on loopback takes its envelopes."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import importlib.util
import logging
import platform
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from supervisor.errors import ConfigError
from supervisor.observe import sentry as subject
from supervisor.observe.context import about
from supervisor.observe.funnel import Funnel
from supervisor.observe.levels import Levels
from supervisor.observe.redact import Redaction
from supervisor.observe.sentry import event_of, scrubbed, start_sentry

TOKEN = "bhw_8hQ3vXk29LmZpR7tYw4cNfB6sJd1gAe5uKi0oTqVxWy"
WORDS = "my secret diary says"
INSTALLED = importlib.util.find_spec("sentry_sdk") is not None
needs_sdk = pytest.mark.skipif(not INSTALLED, reason="sentry-sdk is not installed")


@pytest.fixture(autouse=True)
def _restore():
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)


def failed() -> logging.LogRecord:
    """A redacted record with a traceback whose frames and text hold secrets."""
    prompt = WORDS
    try:
        raise ValueError(f"prompt={prompt} token={TOKEN}")
    except ValueError as error:
        info = (type(error), error, error.__traceback__)
    record = logging.LogRecord("supervisor.x", logging.ERROR, __file__, 1, "failed with %s", (TOKEN,), info)
    vars(record).update(job="j1", model="m", prompt=WORDS)
    Redaction().filter(record)
    return record


def test_an_event_has_the_sentence_the_traceback_and_the_job() -> None:
    event = event_of(failed())
    text = event["logentry"]["formatted"]
    assert text.startswith("failed with bhw_[hidden]\n\nTraceback")
    assert event["tags"] == {"job": "j1", "model": "m"}
    assert event["fingerprint"] == ["{{ default }}", "ValueError"]
    assert WORDS not in str(event)
    assert TOKEN[4:] not in str(event)


def test_what_the_sdk_adds_does_not_leave() -> None:
    event = {
        "event_id": "0" * 32,
        "level": "error",
        "logentry": {"formatted": f"token={TOKEN}"},
        "server_name": "my-pc",
        "user": {"ip_address": "10.0.0.1"},
        "modules": {"trio": "1"},
        "extra": {"sys.argv": ["--token", TOKEN]},
        "exception": {"values": [{"stacktrace": {"frames": [{"vars": {"prompt": WORDS}}]}}]},
        "breadcrumbs": {"values": [{"message": WORDS}]},
    }
    assert scrubbed(event) == {
        "event_id": "0" * 32,
        "level": "error",
        "logentry": {"formatted": "token=[hidden]"},
    }


def test_a_missing_package_or_dsn_is_said_with_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        start_sentry(tmp_path / "none")
    file = tmp_path / "dsn"
    file.write_text("https://key@localhost/1")
    monkeypatch.setitem(__import__("sys").modules, "sentry_sdk", None)
    with pytest.raises(ConfigError, match=r"pip install 'bulkhead-worker\[sentry\]'"):
        start_sentry(file)


class Envelopes(http.server.BaseHTTPRequestHandler):
    bodies: list[bytes]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.bodies.append(gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
        self.send_response(200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_args: object) -> None:
        """Nobody reads it."""


@contextlib.contextmanager
def stand_in() -> Iterator[tuple[int, list[bytes]]]:
    bodies: list[bytes] = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Taker", (Envelopes,), {"bodies": bodies}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.server_address[1], bodies
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@needs_sdk
def test_envelopes_on_the_wire_hold_no_secret_no_words_and_no_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "CLOSE_S", 60.0)  # what is not sent by then is lost, and the machine may be busy
    with stand_in() as (port, bodies):
        file = tmp_path / "dsn"
        file.write_text(f"http://abcdef0123456789@127.0.0.1:{port}/7\n")
        sentry = start_sentry(file)
        funnel = Funnel(Levels("info"), [sentry])
        log = logging.Logger("supervisor.x", logging.DEBUG)
        log.addHandler(funnel)
        with about(job="j1", attempt=2, model="m"):
            log.warning("only a warning")
            prompt = WORDS
            try:
                raise ValueError(f"prompt={prompt} token={TOKEN}")
            except ValueError:
                log.exception("failed with %s", TOKEN, extra={"prompt": WORDS})
        log.name = "urllib3.connectionpool"
        log.error("of the exporter itself")
        sentry.close()
    text = b"\n".join(bodies).decode()
    events = [msgspec.json.decode(line) for body in bodies for line in body.splitlines() if b'"logentry"' in line]
    assert [event["tags"] for event in events] == [{"job": "j1", "attempt": "2", "model": "m"}]
    assert "ValueError" in text
    for secret in (TOKEN[4:], WORDS, socket.gethostname(), '"vars"', "only a warning", "exporter itself"):
        assert secret not in text, secret
    assert platform.node() not in text


@needs_sdk
def test_a_broken_dsn_is_said_without_showing_it(tmp_path: Path) -> None:
    file = tmp_path / "dsn"
    file.write_text("secret-rubbish")
    with pytest.raises(ConfigError, match="holds no DSN") as caught:
        start_sentry(file)
    assert "secret-rubbish" not in str(caught.value)


@needs_sdk
def test_a_server_that_is_gone_holds_up_nothing(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        file = tmp_path / "dsn"
        file.write_text(f"http://abc@127.0.0.1:{taken.getsockname()[1]}/7")
        sentry = start_sentry(file)
        sentry.take(failed())
        sentry.close()
