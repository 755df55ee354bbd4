"""A worker exchanges its token for a key at a real coordinator; what goes wrong leaves everything as it was."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest

from coordinator.enrolments import Enrolments
from coordinator.registrations import Registrations
from coordinator.testing import Running, running
from supervisor import enrolment
from supervisor.cli import main
from supervisor.config import load
from supervisor.enrolment import NotEnrolled, addresses, at_start, enrol
from supervisor.errors import ConfigError, ExitCode, NoPermission
from supervisor.settings import Settings
from supervisor.state import StateFolder, write_atomically


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("coordinator")) as it:
        yield it


@pytest.fixture
def tokens(there: Running) -> Enrolments:
    return Enrolments(there.coordinator.keys.known)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "worker.toml"
    path.write_text('# mine\n[worker]\nstate_dir = "state"\n')
    return path


def test_a_token_becomes_a_key_of_the_workers_own(there: Running, tokens: Enrolments, config: Path) -> None:
    token = tokens.create(60)
    done = enrol(there.url, token, config=config, environ={})
    settings = load(config, {})
    assert settings.coordinator.url == there.url.replace("http", "ws") == done.url
    assert settings.coordinator.token_file == str(done.token_file)
    assert stat.S_IMODE(done.token_file.stat().st_mode) == 0o600
    key = there.coordinator.keys.find(done.token_file.read_text().strip())
    assert key is not None
    assert (key.scope, key.worker) == ("worker", done.worker)
    assert (config.parent / "state" / "worker-id").read_text().strip() == done.worker
    assert config.read_text().startswith("# mine\n")
    assert not [path for path in config.parent.rglob(".enrol-*")]

    with pytest.raises(NotEnrolled, match="used before"):
        enrol(there.url, token, config=config, environ={})
    assert there.coordinator.keys.find(done.token_file.read_text().strip()) == key


def test_the_name_that_the_token_gives_is_taken_over(there: Running, tokens: Enrolments, tmp_path: Path) -> None:
    config = tmp_path / "new" / "worker.toml"  # made
    environ = {"XDG_STATE_HOME": str(tmp_path / "xdg")}
    done = enrol(there.url + "/v1/", tokens.create(60, worker="box7"), config=config, environ=environ)
    settings = load(config, environ)
    assert (done.worker, settings.worker.name, settings.coordinator.dialect) == ("box7", "box7", "native")


@pytest.mark.parametrize("token", ["bhe_" + "a" * 43, "x"])
def test_a_token_that_is_not_good_changes_nothing(there: Running, config: Path, token: str) -> None:
    before = config.read_bytes()
    with pytest.raises(NotEnrolled, match="does not admit this worker"):
        enrol(there.url, token, config=config, environ={})
    assert config.read_bytes() == before
    assert not (config.parent / "state" / "coordinator-token").exists()


def test_a_machine_that_cannot_keep_a_key_spends_no_token(
    there: Running, tokens: Enrolments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tokens.create(60)
    broken = tmp_path / "worker.toml"
    broken.write_text("[worker\n")
    with pytest.raises(ConfigError):
        enrol(there.url, token, config=broken, environ={})
    (tmp_path / "file").write_text("")
    with pytest.raises(NoPermission):
        enrol(there.url, token, config=tmp_path / "file" / "worker.toml", environ={"XDG_STATE_HOME": str(tmp_path)})
    good = tmp_path / "good.toml"
    enrol(there.url, token, config=good, environ={"XDG_STATE_HOME": str(tmp_path)})


@pytest.mark.parametrize(
    "url",
    [
        *("", "box", "ftp://box", "https://", "https://u:p@box", "https://box/?x", "file:///x"),
        *("https://[box", "https://box:x", "https://box:99999", "https://box:0", "https://b x", "https://b\x1bx"),
    ],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="expected https"):
        addresses(url)


def test_addresses() -> None:
    both = ("https://box:1/a/v1/workers/enrol", "wss://box:1/a")
    for url in ("https://box:1/a", "wss://box:1/a/v1/worker", "https://box:1/a/v1/"):
        assert addresses(url) == both


class _Odd(BaseHTTPRequestHandler):
    """Answers, but is no coordinator."""

    said: tuple[int, bytes] = (200, b"<html>")

    def do_POST(self) -> None:
        self.send_response(self.said[0])
        self.send_header("content-length", str(len(self.said[1])))
        self.end_headers()
        self.wfile.write(self.said[1])

    def log_message(self, *_words: object) -> None:
        """Quiet."""


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, b"<html>"),
        (404, b""),
        (500, b'{"error": 1}'),
        (403, b'{"error": {"message": "\\u001b[31mno"}}'),
        (201, b"{}"),
        (201, b'{"worker": "../x", "token": "t"}'),
        (201, b'{"worker": "x", "token": "a\\nb"}'),
        (201, b'{"worker": "x", "token": ""}'),
        (201, b'{"worker": "x", "token": 7.5}'),
        (201, b'{"worker": "\xff", "token": "t"}'),
        (201, b"[" * 60_000),
        (403, b'{"error": ' + b"[" * 60_000),
        (403, b"\xff"),
    ],
)
def test_a_server_that_is_no_coordinator_is_told_apart(config: Path, status: int, body: bytes) -> None:
    _Odd.said = (status, body)
    with HTTPServer(("127.0.0.1", 0), _Odd) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        with pytest.raises(NotEnrolled) as caught:
            enrol(f"http://127.0.0.1:{server.server_port}", "bhe_x", config=config, environ={})
        thread.join()
    assert "\x1b" not in str(caught.value)
    assert not (config.parent / "state" / "coordinator-token").exists()


class _Endless(_Odd):
    """Goes on and on: a piece, a pause, a piece."""

    piece, pause_s = b" " * 60_000, 0.0

    def do_POST(self) -> None:
        self.send_response(201)
        self.send_header("content-length", str(2**40))
        self.end_headers()
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(self.piece)
                time.sleep(self.pause_s)


@pytest.mark.parametrize(
    ("piece", "pause_s", "ask_s", "words"),
    [(b" " * 60_000, 0.0, 60.0, "longer than any"), (b" ", 0.01, 0.2, "was not whole after 0.2 s")],
)
def test_an_answer_without_an_end_is_left(
    config: Path, monkeypatch: pytest.MonkeyPatch, piece: bytes, pause_s: float, ask_s: float, words: str
) -> None:
    monkeypatch.setattr("supervisor.enrolment.ASK_S", ask_s)
    client = enrolment._client

    def patient(tls_ca: str) -> httpx.Client:
        made = client(tls_ca)
        made.timeout = httpx.Timeout(60.0)  # for each piece: the server's thread may have to wait for the processor
        return made

    monkeypatch.setattr(enrolment, "_client", patient)
    monkeypatch.setattr(_Endless, "piece", piece)
    monkeypatch.setattr(_Endless, "pause_s", pause_s)
    with HTTPServer(("127.0.0.1", 0), _Endless) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        with pytest.raises(NotEnrolled, match=words):
            enrol(f"http://127.0.0.1:{server.server_port}", "bhe_x", config=config, environ={})
        thread.join(30)
        assert not thread.is_alive()


def test_a_key_that_a_cut_off_enrolment_left_is_told(there: Running, config: Path) -> None:
    (config.parent / "state").mkdir()
    (config.parent / "state" / "coordinator-token").write_text("bhk_x")
    with pytest.raises(NotEnrolled, match=r"unknown.* A key that .*worker.toml does not name is in .*by hand"):
        enrol(there.url, "bhe_" + "a" * 43, config=config, environ={})


def test_a_user_without_a_name_may_ask(there: Running, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr("getpass.getuser", nameless)

    def admit(text: str) -> None:
        if "approve" in text:
            Registrations(there.coordinator.keys.known).reject(text.split()[3], "seen")

    with pytest.raises(NotEnrolled, match="seen"):
        enrol(there.url, "", config=config, environ={}, ask=admit, pause_s=0.01)


def test_a_coordinator_that_cannot_be_reached_leaves_the_token_good(config: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        with pytest.raises(NotEnrolled, match="good still"):
            enrol(f"http://127.0.0.1:{taken.getsockname()[1]}", "bhe_x", config=config, environ={})


def test_the_verb(
    there: Running,
    tokens: Enrolments,
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(tokens.create(60, worker="box8") + "\n"))
    assert main(["enrol", there.url, "--config", str(config)]) == 0
    assert "This worker is box8" in capsys.readouterr().out
    file = config.parent / "token"
    file.write_text(tokens.create(60))
    file.chmod(0o644)
    assert main(["enrol", there.url, "--config", str(config), "--token-file", str(file)]) == ExitCode.BAD_CONFIG
    os.chmod(file, 0o600)
    assert main(["enrol", there.url, "--config", str(config), "--token-file", str(file)]) == 0
    assert main(["enrol", there.url, "x", "--config", str(config)]) == ExitCode.REFUSED
    assert "no enrolment token" in capsys.readouterr().err


def test_the_verb_makes_worker_toml_where_all_others_look_for_it(
    there: Running, tokens: Enrolments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One beside whatever the person stood in would hide his own there, and be found nowhere else."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("BULKHEAD_CONFIG", "XDG_STATE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert main(["enrol", there.url, tokens.create(60)]) == 0
    assert (tmp_path / ".config" / "bulkhead" / "worker.toml").is_file()
    assert list((tmp_path / "cwd").iterdir()) == []


def test_without_a_token_a_worker_waits_until_it_is_admitted(there: Running, config: Path) -> None:
    registrations, said = Registrations(there.coordinator.keys.known), list[str]()

    def decide(text: str) -> None:
        said.append(text)
        if len(said) == 2:  # the command that an admin is told to run
            words = text.split()
            registrations.approve(words[3], words[5])

    done = enrol(there.url, "", config=config, environ={}, ask=decide, pause_s=0.01)
    key = there.coordinator.keys.find(done.token_file.read_text().strip())
    assert key is not None
    assert key.worker == done.worker
    assert load(config, {}).coordinator.token_file == str(done.token_file)


def test_a_worker_that_an_admin_refuses_is_told_so(there: Running, config: Path) -> None:
    registrations = Registrations(there.coordinator.keys.known)

    def refuse(text: str) -> None:
        if text.startswith("  coordinator"):
            registrations.reject(text.split()[3], "not \x1b[31mours")

    with pytest.raises(NotEnrolled, match="has refused this worker: not ") as caught:
        enrol(there.url, "", config=config, environ={}, ask=refuse, pause_s=0.01)
    assert "\x1b" not in str(caught.value)
    assert main(["enrol", there.url, "x", "--ask", "--config", str(config)]) == ExitCode.BAD_CONFIG


def started(there: Running, folder: Path, token: str, more: str = "") -> Settings:
    """The settings of a machine that was given a token only, after its start."""
    (folder / "token").write_bytes(token.encode())
    (folder / "token").chmod(0o600)
    url = there.url.replace("http", "ws")
    files = 'token_file = "key"\nenrol_token_file = "token"'
    path = folder / "worker.toml"
    path.write_text(f'[worker]\nstate_dir = "state"\n{more}\n[coordinator]\nurl = "{url}"\n{files}\n')
    settings = load(path, {})
    at_start(settings, {})
    return settings


def test_a_machine_enrols_at_its_first_start_and_not_again(there: Running, tokens: Enrolments, tmp_path: Path) -> None:
    settings = started(there, tmp_path, tokens.create(60, worker="box11"))
    key = there.coordinator.keys.find((tmp_path / "key").read_text().strip())
    assert key is not None
    assert key.worker == "box11"
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    assert StateFolder(tmp_path / "state").worker_id("") == "box11"
    (tmp_path / "token").unlink()
    at_start(settings, {})
    assert load(tmp_path / "worker.toml", {}).coordinator.token_file == str(tmp_path / "key")


def test_a_start_that_is_cut_off_does_not_go_on_under_another_name(
    there: Running, tokens: Enrolments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(path: Path, data: bytes) -> None:
        write_atomically(path, data)
        if path.name == "key":
            raise KeyboardInterrupt

    monkeypatch.setattr("supervisor.enrolment.write_atomically", cut)
    with pytest.raises(KeyboardInterrupt):
        started(there, tmp_path, tokens.create(60, worker="box13"))
    assert StateFolder(tmp_path / "state").worker_id("") == "box13"


@pytest.mark.parametrize("around", ["\ufeff{}\r\n", "\n{}\n\n"])
def test_marks_and_lines_around_a_token_are_no_part_of_it(
    there: Running, tokens: Enrolments, tmp_path: Path, around: str
) -> None:
    started(there, tmp_path, around.format(tokens.create(60)))
    assert (tmp_path / "key").exists()


@pytest.mark.parametrize("text", ["", "\n", "bhe_x\nbhe_y", "bhe_\u00e4", "a token"])
def test_what_is_no_token_is_not_sent(there: Running, tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="must hold the token alone"):
        started(there, tmp_path, text)


def test_a_name_that_is_not_the_tokens_is_told(there: Running, tokens: Enrolments, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='the token admits "box12"'):
        started(there, tmp_path, tokens.create(60, worker="box12"), 'name = "other"')
    assert (tmp_path / "key").exists()


def test_a_start_without_a_good_token_ends(there: Running, tmp_path: Path) -> None:
    with pytest.raises(NotEnrolled, match="unknown") as caught:
        started(there, tmp_path, "bhe_" + "a" * 43)
    assert caught.value.exit_code == ExitCode.REFUSED
    (tmp_path / "token").unlink()
    with pytest.raises(ConfigError, match="enrolment token"):
        at_start(load(tmp_path / "worker.toml", {}), {})
    (tmp_path / "worker.toml").write_text('[coordinator]\nenrol_token_file = "token"\n')
    with pytest.raises(ConfigError, match="enrol_token_file"):
        load(tmp_path / "worker.toml", {})
