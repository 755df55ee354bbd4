"""The embedded coordinator as a real child: the real one, and a script that behaves as a test needs."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import trio

from supervisor import embedded as subject
from supervisor.embedded import open_embedded
from supervisor.errors import ConfigError, CoordinatorFailed, IdentityHeld
from supervisor.host.child import ChildSpec
from supervisor.settings import CoordinatorTable

TABLE = CoordinatorTable(listen="127.0.0.1:0")


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that ends by itself is waited for, however busy the machine is."""
    monkeypatch.setattr(subject, "STOP_S", 60.0)


class Told:
    """What `on_ready` was told, and a way to wait for it."""

    def __init__(self) -> None:
        self.ready: list = []
        self._arrivals_in, self._arrivals = trio.open_memory_channel(100)

    def __call__(self, ready) -> None:
        self.ready.append(ready)
        self._arrivals_in.send_nowait(ready)

    async def next(self):
        with trio.fail_after(60):
            return await self._arrivals.receive()


def play(monkeypatch, script: str) -> None:
    """Put a Python script in the coordinator's place; `fd`, `token` and `say(line)` are given."""
    prelude = (
        "import sys, os, json, signal, time\n"
        "fd, token = int(sys.argv[1]), open(int(sys.argv[2])).read()\n"
        "def say(line): print(line, flush=True)\n"
        "ready = json.dumps({'ready': True, 'url': 'http://u', 'client_key_file': '/k', 'more': 1})\n"
    )
    original = subject.Embedded._spec

    def spec(self, token_fd: int) -> ChildSpec:
        real = original(self, token_fd)
        argv = (sys.executable, "-c", prelude + script, str(self._listener.fileno()), str(token_fd))
        return ChildSpec(name="c", argv=argv, pass_fds=real.pass_fds, on_stderr_line=real.on_stderr_line)

    monkeypatch.setattr(subject.Embedded, "_spec", spec)


async def test_the_real_one_serves_on_our_listener_and_ends_without_a_signal(tmp_path):
    told = Told()
    async with open_embedded(TABLE, tmp_path / "c", told) as embedded:
        ready = await told.next()
        assert embedded.address.url.replace("ws", "http", 1) == ready.url
        answer = await trio.to_thread.run_sync(
            lambda: urllib.request.urlopen(f"{ready.url}/healthz", timeout=60).status
        )
        assert answer == 200
        assert os.stat(ready.client_key_file).st_mode & 0o077 == 0
        child = embedded._child
        await embedded.drain()
    assert child.exit.code == 0, child.stderr_tail()


@pytest.fixture
def certificates(tmp_path):
    """Two self-signed certificates, mine.pem and other.pem, with their keys."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl to make a certificate with")
    for name in ("mine", "other"):
        words = f"req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -subj /CN={name}.example"
        words += f" -keyout {tmp_path}/{name}.key -out {tmp_path}/{name}.pem"
        subprocess.run([openssl, *words.split()], check=True, capture_output=True)
    return tmp_path


async def test_over_tls_our_own_link_trusts_exactly_the_certificate_that_is_served(certificates, tmp_path):
    table = CoordinatorTable(
        listen="127.0.0.1:0", tls_cert=str(tmp_path / "mine.pem"), tls_key=str(tmp_path / "mine.key")
    )

    def ask(url: str, context: ssl.SSLContext) -> int:
        with urllib.request.urlopen(f"{url}/healthz", context=context, timeout=60) as answer:
            return answer.status

    told = Told()
    async with open_embedded(table, tmp_path / "c", told) as embedded:
        url = (await told.next()).url
        assert url.startswith("https://")
        assert embedded.address.url.startswith("wss://127.0.0.1:")
        assert await trio.to_thread.run_sync(ask, url, embedded.address.tls) == 200
        with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
            await trio.to_thread.run_sync(ask, url, subject._trust(str(tmp_path / "other.pem")))


async def test_the_token_travels_through_the_pipe_alone(monkeypatch, tmp_path, caplog):
    caplog.set_level("INFO")
    play(
        monkeypatch,
        "sys.stderr.write('2026-11-21 10:00:00,1 WARNING coordinator.x: token ' + str(len(token)) + '\\n')\n"
        "sys.stderr.write('no log line ' + str(token in ' '.join(sys.argv + list(os.environ.values()))) + '\\n')\n"
        "sys.stderr.flush(); say(ready); sys.stdin.read()",
    )
    told = Told()
    async with open_embedded(TABLE, tmp_path, told) as embedded:
        ready = await told.next()
        assert (ready.url, ready.client_key_file) == ("http://u", "/k")
        assert embedded._token not in repr(embedded.address)
    lines = {(record.name, record.levelname, record.message) for record in caplog.records}
    assert ("coordinator.x", "WARNING", "token 43") in lines, "a log line keeps its level and name"
    assert ("coordinator", "INFO", "no log line False") in lines


def test_what_workers_log_is_not_logged_again(caplog):
    with caplog.at_level("INFO"):
        subject._pass_on("2026-01-01 00:00:00.000 WARNING coordinator.worker: box 'app: a warning of ours' ")
        subject._pass_on("2026-01-01 00:00:00.000 WARNING coordinator.gateway: a warning of its own")
    assert [(record.name, record.message) for record in caplog.records] == [
        ("coordinator.gateway", "a warning of its own")
    ]


def test_the_coordinator_logs_what_workers_log_by_that_name():
    assert (
        f'getLogger("{subject.OF_WORKERS}")'
        in (Path(subject.__file__).parents[1] / "coordinator/worker_lines.py").read_text()
    )


async def test_one_that_dies_is_started_again_on_the_same_port_with_the_same_token(monkeypatch, tmp_path, caplog):
    play(monkeypatch, "ready = ready.replace('/k', token); say(ready); sys.stdin.read()")
    told = Told()
    async with open_embedded(TABLE, tmp_path, told) as embedded:
        first = await told.next()
        port = embedded._listener.getsockname()[1]
        embedded._child.signal(signal.SIGKILL)
        second = await told.next()
        assert first == second
        assert embedded._listener.getsockname()[1] == port
        with socket.create_connection(("127.0.0.1", port), 30):
            pass  # the listener was never closed
    assert "killed by SIGKILL; starting it again" in caplog.text


async def test_a_drain_is_told_also_to_one_that_starts_later(monkeypatch, tmp_path, caplog):
    caplog.set_level("INFO")
    play(monkeypatch, "say(ready); print(os.getpid(), sys.stdin.readline(), file=sys.stderr); sys.stdin.read()")
    told = Told()
    async with open_embedded(TABLE, tmp_path, told) as embedded:
        await told.next()
        await embedded.drain()
        embedded._child.signal(signal.SIGKILL)
        await told.next()
        second = embedded._child.pid
    assert f"{second} drain" in caplog.text


@pytest.mark.parametrize(
    ("script", "error", "words"),
    [
        ("sys.exit('broken in two')", CoordinatorFailed, "ended with exit code 1: broken in two"),
        ("sys.stderr.write('Give a key.\\n'); sys.exit(78)", ConfigError, "Give a key."),
        ("sys.stderr.write('Held by 7.\\n'); sys.exit(73)", IdentityHeld, "Held by 7."),
        ("import no_such_module", CoordinatorFailed, r"install it with: pip install 'bulkhead-worker\[coordinator\]'"),
        ("say('nonsense'); sys.stdin.read()", CoordinatorFailed, "The coordinator"),
    ],
)
async def test_a_first_start_that_fails_is_told_at_once(monkeypatch, tmp_path, script, error, words):
    play(monkeypatch, script)
    with pytest.raises(error, match=words):
        async with open_embedded(TABLE, tmp_path, Told()):
            pytest.fail("it did not start")


async def test_one_that_never_becomes_ready_is_ended(monkeypatch, tmp_path):
    monkeypatch.setattr(subject, "READY_S", 0.3)
    monkeypatch.setattr(subject, "STOP_S", 0.1)
    play(monkeypatch, "time.sleep(600)")
    with pytest.raises(CoordinatorFailed, match="SIGTERM"):
        async with open_embedded(TABLE, tmp_path, Told()):
            pytest.fail("it did not start")


async def test_a_port_that_is_taken_names_the_cure(monkeypatch, tmp_path):
    monkeypatch.setattr(subject, "PREDECESSOR_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as other:
        table = CoordinatorTable(listen=f"127.0.0.1:{other.getsockname()[1]}")
        with pytest.raises(CoordinatorFailed, match="end the other program or choose another port"):
            async with open_embedded(table, tmp_path, Told()):
                pytest.fail("it did not start")


async def test_a_port_that_is_just_being_left_is_waited_for(monkeypatch, tmp_path, caplog):
    """The coordinator of a supervisor that was killed needs a moment to notice."""
    monkeypatch.setattr(subject, "PREDECESSOR_S", 60.0)
    other = socket.create_server(("127.0.0.1", 0))

    async def leave() -> None:
        with trio.fail_after(30):
            while "waiting for a moment" not in caplog.text:  # noqa: ASYNC110  the log is all that tells of it
                await trio.sleep(0.02)
        other.close()

    caplog.set_level("INFO")
    table = CoordinatorTable(listen=f"127.0.0.1:{other.getsockname()[1]}")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(leave)
        async with open_embedded(table, tmp_path / "c", Told()) as embedded:
            assert embedded.address.url == f"ws://{table.listen}"


async def test_a_host_that_does_not_exist(tmp_path):
    with pytest.raises(ConfigError, match="cannot be resolved"):
        async with open_embedded(CoordinatorTable(listen="no-such-host.invalid:0"), tmp_path, Told()):
            pytest.fail("it did not start")


async def test_listening_everywhere_in_the_clear_is_refused_by_the_real_one(tmp_path):
    with pytest.raises(ConfigError, match="in the clear"):
        async with open_embedded(CoordinatorTable(listen="0.0.0.0:0"), tmp_path / "c", Told()):
            pytest.fail("it did not start")
