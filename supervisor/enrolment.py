"""`supervisor enrol URL`: exchange a one-time token for this worker's own key, and write both down.

What it does, in this order: worker.toml and the state folder are looked at, so that no token is spent on a machine that
cannot keep its key; the coordinator is asked once (`POST /v1/workers/enrol`); the key is written to a file of its own
(mode 0600, in the state folder); `[coordinator]` of worker.toml gets the address and the name of that file. No
supervisor need run; one that does takes it up with its next start.

Without a token it asks to be admitted (`--ask`), says by which digits an admin knows the request as this machine's, and
waits for the decision.

A token is good once. When the answer is lost on its way the token is spent all the same, and the sentence says so.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import hashlib
import os
import secrets
import socket
import ssl
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import msgspec

from protocol.ids import is_safe_id
from supervisor.config import load, state_dir
from supervisor.config_edit import edit
from supervisor.errors import ConfigError, ExitCode, LinkRefused, NoPermission, SupervisorError
from supervisor.model_places import config_path
from supervisor.registration import TOKEN_FILE
from supervisor.secrets import MAX_BYTES, judge_file
from supervisor.settings import Settings
from supervisor.state import StateFolder, write_atomically
from supervisor.version import version

if TYPE_CHECKING:
    import httpx

ASK_S = 30.0
MAX_ANSWER_BYTES = 65_536
POLL_S = 5.0
ROUTE = "/v1/workers/enrol"
_SOCKETS = {"https": "wss", "http": "ws", "wss": "wss", "ws": "ws"}
_PAGES = {"wss": "https", "ws": "http"}


class NotEnrolled(SupervisorError):
    """The coordinator did not admit this worker, or could not be asked; nothing was changed here."""

    exit_code = LinkRefused.exit_code


class NotReached(NotEnrolled):
    """The coordinator could not be asked; the token is good still, and another start may help."""

    exit_code = ExitCode.INTERNAL


class Enrolled(NamedTuple):
    """What became of it.

    Attributes:
        url: of the coordinator's socket, as worker.toml has it now.
        worker: the id under which this worker is known there.
        token_file: holds its key.
    """

    url: str
    worker: str
    token_file: Path


class _Answer(NamedTuple):
    worker: str
    token: str


class _Said(NamedTuple):
    status: int
    body: bytes


def add_arguments(_name: str, parser: argparse.ArgumentParser) -> None:
    """Describe the arguments of the verb."""
    parser.add_argument("url", metavar="URL", help="https:// address of the coordinator")
    parser.add_argument("token", metavar="TOKEN", nargs="?", default="", help="default: it is asked for, or piped in")
    parser.add_argument("--token-file", metavar="FILE", default="", help="holds the token")
    parser.add_argument("--ask", action="store_true", help="without a token: wait until an admin admits this worker")
    parser.add_argument("--tls-ca", metavar="FILE", default="", help="PEM file to trust")
    parser.add_argument("--config", metavar="FILE", help="worker.toml; made when it is not there")
    parser.set_defaults(command=command)


def command(arguments: argparse.Namespace) -> int:
    """Carry the verb out."""
    if arguments.ask and (arguments.token or arguments.token_file):
        raise ConfigError(["--ask needs no token"])
    done = enrol(
        arguments.url,
        "" if arguments.ask else _token(arguments),
        ask=_say if arguments.ask else None,
        config=config_path(arguments.config),
        tls_ca=str(Path(arguments.tls_ca).expanduser().absolute()) if arguments.tls_ca else "",
    )
    _say(f"This worker is {done.worker} at {done.url}; its key is in {done.token_file}. `supervisor run` takes it up.")
    return 0


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _token(arguments: argparse.Namespace) -> str:
    if arguments.token and arguments.token_file:
        raise ConfigError(["give TOKEN or --token-file, not both"])
    if arguments.token:
        return str(arguments.token).strip()
    if arguments.token_file:
        return read_token(Path(arguments.token_file).expanduser())
    if sys.stdin.isatty():
        return getpass.getpass("Enrolment token: ").strip()
    return sys.stdin.readline().strip()


def read_token(path: Path) -> str:
    """The token in a file of the operator's. Raises ConfigError."""
    if sentence := judge_file(path, strict=True):
        raise ConfigError([f"enrolment token: {sentence}"])
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES).decode("utf-8-sig").strip()  # editors of Windows put a mark before it
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"enrolment token: {path} cannot be read: {error}"]) from None
    if not _may_be_token(text):
        raise ConfigError([f"enrolment token: {path} must hold the token alone, in one line"])
    return text


def _may_be_token(text: str) -> bool:
    """Whether it can travel in a header of HTTP."""
    return text != "" and text.isascii() and text.isprintable() and " " not in text


def enrol(
    url: str,
    token: str,
    *,
    config: Path,
    tls_ca: str = "",
    environ: Mapping[str, str] = os.environ,
    ask: Callable[[str], None] | None = None,
    pause_s: float = POLL_S,
) -> Enrolled:
    """See the module; blocks for up to `ASK_S`, or until an admin has decided.

    Args:
        url: of the coordinator: https://, or wss:// as worker.toml has it.
        token: good once.
        config: worker.toml; made when it does not exist.
        tls_ca: PEM file to trust, "" for the system's.
        ask: given, no token is used; called with what the operator has to know.
        pause_s: between two questions whether it was decided.

    Raises:
        NotEnrolled: the coordinator refused, or the answer did not come.
        ConfigError, NoPermission: worker.toml is wrong or cannot be written.
    """
    page, address = addresses(url)
    if ask is None and not _may_be_token(token):
        raise ConfigError(["there is no enrolment token, or it has characters that no token has"])
    settings = load(config, environ) if config.is_file() else Settings()
    folder = state_dir(settings, environ)
    key_file = folder / TOKEN_FILE
    _check_writable(config, folder)
    name = StateFolder(folder).worker_id(settings.worker.name)
    with _client(tls_ca or settings.coordinator.tls_ca) as client:
        try:
            answer = _exchange(client, page, token, name) if ask is None else _request(client, page, name, ask, pause_s)
        except NotEnrolled as error:
            if not key_file.exists() or settings.coordinator.token_file == str(key_file):
                raise
            left = f"A key that {config} does not name is in {key_file}, as an enrolment leaves it that was cut off"
            raise type(error)(
                f"{error} {left}: if it is of this coordinator, set url and token_file by hand."
            ) from None
    write_atomically(key_file, answer.token.encode() + b"\n")
    values: dict[str, Any] = {
        "coordinator.url": address,
        "coordinator.dialect": "native",
        "coordinator.token_file": str(key_file),
    }
    if tls_ca:
        values["coordinator.tls_ca"] = tls_ca
    if answer.worker != name:
        values["worker.name"] = answer.worker
    try:
        edit(config, values)
    except (ConfigError, NoPermission, OSError) as error:
        kept = f"The key was given out and is in {key_file}, but {config} could not be changed"
        raise NotEnrolled(f"{kept}: {error}. Set [coordinator] url and token_file by hand.") from None
    return Enrolled(address, answer.worker, key_file)


def at_start(settings: Settings, environ: Mapping[str, str] = os.environ) -> None:
    """`[coordinator] enrol_token_file`: enrol before the first run, for machines that nobody logs in to.

    worker.toml is left as it is: it names the file already in which the key is put.

    Raises:
        NotEnrolled: the coordinator refused, or could not be asked.
        ConfigError, NoPermission: the token or a folder cannot be used.
    """
    table = settings.coordinator
    key_file = Path(table.token_file)
    if key_file.exists():
        return
    token, folder = read_token(Path(table.enrol_token_file)), state_dir(settings, environ)
    page, _ = addresses(table.url)
    _check_writable(key_file, folder)
    name = StateFolder(folder).worker_id(settings.worker.name)
    with _client(table.tls_ca) as client:
        answer = _exchange(client, page, token, name)
    if answer.worker != name and not settings.worker.name:
        # Before the key: with that the next start is none that enrols, and would go on under another name.
        write_atomically(folder / "worker-id", answer.worker.encode() + b"\n")
    write_atomically(key_file, answer.token.encode() + b"\n")
    if answer.worker != name and settings.worker.name:
        raise ConfigError(
            [f'worker.name: the token admits "{answer.worker}"; its key is in {key_file}, change the name']
        )


def addresses(url: str) -> tuple[str, str]:
    """The page to ask, and the socket for worker.toml. Raises ConfigError."""
    try:
        parts = urlsplit(url)
        fit = parts.port != 0 and url.isprintable() and " " not in url
    except ValueError:  # of a port, of brackets
        parts, fit = urlsplit(""), False
    if not fit or parts.scheme not in _SOCKETS or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise ConfigError([f"{url[:200]}: expected https://HOST, the coordinator's address, without user and query"])
    base = parts.path.rstrip("/").removesuffix("/v1/worker").removesuffix("/v1")
    address = f"{_SOCKETS[parts.scheme]}://{parts.netloc}{base}"
    return f"{_PAGES[_SOCKETS[parts.scheme]]}://{parts.netloc}{base}{ROUTE}", address


def _check_writable(config: Path, folder: Path) -> None:
    """Raises NoPermission before anything is spent."""
    for place in (folder, config.absolute().parent):
        try:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise NoPermission(f"{place} cannot be made: {error.strerror}.") from None
        probe = place / f".enrol-{os.getpid()}"
        try:
            write_atomically(probe, b"")
        except OSError as error:
            raise NoPermission(f"{place} cannot be written: {error.strerror}.") from None
        finally:
            with contextlib.suppress(OSError):
                probe.unlink()


def _client(tls_ca: str) -> httpx.Client:
    import httpx

    try:
        tls: Any = ssl.create_default_context(cafile=tls_ca) if tls_ca else True
    except (OSError, ValueError) as error:
        raise ConfigError([f"tls_ca: {tls_ca} cannot be read: {error}"]) from None
    return httpx.Client(verify=tls, timeout=ASK_S, trust_env=False, follow_redirects=False)


def _ask(client: httpx.Client, method: str, page: str, headers: Mapping[str, str], body: Any = None) -> _Said:
    """One question, and an answer of bearable length within about `ASK_S`; more is never kept, nor unpacked.

    Raises:
        httpx.HTTPError: it could not be asked, or no such answer came.
        ConfigError: the address is none.
    """
    import httpx

    try:
        request = client.build_request(method, page, json=body, headers={**headers, "accept-encoding": "identity"})
    except (httpx.InvalidURL, ValueError) as error:
        raise ConfigError([f"{page} is no address: {error}"]) from None
    until, data = time.monotonic() + ASK_S, b""
    response = client.send(request, stream=True)
    try:
        for piece in response.iter_raw():
            data += piece
            if len(data) > MAX_ANSWER_BYTES:
                raise httpx.ReadError("it is longer than any of a coordinator")
            if time.monotonic() > until:
                raise httpx.ReadTimeout(f"it was not whole after {ASK_S:g} s")
    finally:
        response.close()
    return _Said(response.status_code, data)


def _exchange(client: httpx.Client, page: str, token: str, name: str) -> _Answer:
    import httpx

    try:
        said = _ask(client, "POST", page, {"authorization": f"Bearer {token}"}, {"worker": name})
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol) as error:
        raise NotReached(f"{page} cannot be reached: {error}. The token is good still.") from None
    except httpx.HTTPError as error:
        lost = f"{page} was asked, but its answer did not come ({error or type(error).__name__})"
        raise NotEnrolled(f"{lost}. If the token is refused now, it was spent: make another one.") from None
    if said.status != 201:
        raise NotEnrolled(f"{page} does not admit this worker: {_reason(said)}")
    return _answer(page, said)


def _request(client: httpx.Client, page: str, name: str, say: Callable[[str], None], pause_s: float) -> _Answer:
    """Ask to be admitted, and again and again whether it was decided. Raises NotEnrolled."""
    import httpx

    secret = secrets.token_urlsafe(32)
    digest = hashlib.sha256(secret.encode()).hexdigest()
    asked = {
        "worker": name,
        "secret_sha256": digest,
        "machine": socket.gethostname()[:200],
        "user": _user(),
        "version": version()[:200],
    }
    try:
        said = _ask(client, "POST", f"{page}/requests", {}, asked)
    except httpx.HTTPError as error:
        raise NotEnrolled(f"{page} cannot be asked: {error or type(error).__name__}.") from None
    if said.status not in (200, 201):
        raise NotEnrolled(f"{page} does not take the request: {_reason(said)}")
    number = _text_of(said, "id")
    if not is_safe_id(number):
        raise NotEnrolled(f"{page} answered what is no request; is this a coordinator?")
    say(f"Waiting to be admitted as {name}: request {number}, secret {digest[:8]}. An admin runs:")
    say(f"  coordinator registrations approve {number} --secret {digest[:8]}")
    while (answer := _decided(client, f"{page}/requests/{number}", secret)) is None:
        time.sleep(pause_s)
    return answer


def _decided(client: httpx.Client, page: str, secret: str) -> _Answer | None:
    """The key, or None while nobody has decided. Raises NotEnrolled."""
    import httpx

    try:
        said = _ask(client, "GET", page, {"authorization": f"Bearer {secret}"})
    except httpx.HTTPError:
        return None  # it is started anew, perhaps; the request is kept
    if said.status >= 500 or said.status in (408, 429):
        return None
    if said.status != 200:
        raise NotEnrolled(f"{page} does not know the request any more: {_reason(said)}")
    status = _text_of(said, "status")
    if status == "rejected":
        reason = _fit(_text_of(said, "reason"))
        raise NotEnrolled(f"An admin has refused this worker{': ' + reason if reason else ''}.")
    return _answer(page, said) if status == "approved" else None


def _user() -> str:
    try:
        return getpass.getuser()[:200]
    except (KeyError, OSError):  # a container may run as a number that has no name
        return f"user {os.getuid()}"


def _object(said: _Said) -> dict[str, Any]:
    """The answer as an object of JSON, empty when it is none."""
    try:
        return msgspec.json.decode(said.body, type=dict[str, Any])
    except (ValueError, RecursionError):  # of msgspec, and of text that is none
        return {}


def _text_of(said: _Said, name: str) -> str:
    text = _object(said).get(name)
    return text if isinstance(text, str) else ""


def _answer(page: str, said: _Said) -> _Answer:
    worker, token = _text_of(said, "worker"), _text_of(said, "token")
    if not is_safe_id(worker) or not _may_be_token(token):
        raise NotEnrolled(f"{page} answered what is no key; is this a coordinator?")
    return _Answer(worker, token)


def _reason(said: _Said) -> str:
    """The coordinator's own sentence, fit for a terminal."""
    error = _object(said).get("error")
    sentence = error.get("message") if isinstance(error, dict) else None
    return _fit(str(sentence) if sentence else f"HTTP {said.status}; is this a coordinator?")


def _fit(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:500]
