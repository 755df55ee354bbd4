"""The `coordinator` command: serve, migrate, and what the other modules of this folder add to it.

Exit codes: 0 done or stopped as asked, 1 failed, 64 usage, 70 internal, 73 another coordinator has this state
folder, 78 bad configuration.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

from coordinator import config as configuration
from coordinator import logs
from coordinator.blobs.opening import BLOB_FOLDER, BlobsRefusal, open_blobs
from coordinator.cli import deploy as cli_deploy
from coordinator.cli import doctor as cli_doctor
from coordinator.cli import jobs as cli_jobs
from coordinator.cli import keys as cli_keys
from coordinator.cli import service as cli_service
from coordinator.cli import usage as cli_usage
from coordinator.cli.http import AskError
from coordinator.config import STORE_VARIABLE, Config
from coordinator.dispatch_settings import DispatchSettings
from coordinator.keys import FILE_NAME, KeyRefusal, Keys, secret_file
from coordinator.register import open_register
from coordinator.registrations import RegistrationRefusal
from coordinator.replicas.opening import open_doorway
from coordinator.server import Refusal, Serving, adopt, check_exposure, check_tls, listen, ready_line, run
from coordinator.service import notify
from coordinator.services import Limits
from coordinator.store import StoreBusy, StoreError
from coordinator.store.opening import SQLITE, STORE_FILE, check_address, is_postgres, open_store, require_psycopg
from coordinator.traces import OtelConfig, TraceRefusal, open_traces
from protocol.faults import FaultError

if TYPE_CHECKING:
    from coordinator.app import Coordinator
    from coordinator.replicas.opening import Doorway

log = logging.getLogger(__name__)

OK, FAILED, USAGE, INTERNAL, BUSY, BAD_CONFIG = 0, 1, 64, 70, 73, 78
CLIENT_KEY_FILE = "client.key"
WORKER_TOKEN_FILE = "worker.token"
EMBEDDED_FOLDER = "coordinator"  # in a worker's state folder
MAX_TOKEN_BYTES = 4096
PREDECESSOR_S = 4.0
T = TypeVar("T")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(USAGE, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = _parser().parse_args(argv)
    if not logging.getLogger().handlers:
        logs.set_up()
    try:
        return int(arguments.command(arguments))
    except (Refusal, TraceRefusal, KeyRefusal, RegistrationRefusal) as error:
        print(f"coordinator: {error}", file=sys.stderr)
        return BAD_CONFIG
    except AskError as error:
        print(f"coordinator: {error}", file=sys.stderr)
        return FAILED
    except StoreBusy as error:
        print(f"coordinator: {error}", file=sys.stderr)
        return BUSY
    except (StoreError, FaultError, OSError) as error:
        print(f"coordinator: {error}", file=sys.stderr)
        return FAILED


def _parser() -> argparse.ArgumentParser:
    shared = _Parser(add_help=False)
    shared.add_argument("--config", type=Path, metavar="FILE", help="coordinator.toml")
    shared.add_argument("--state", metavar="DIR", help="folder of jobs, files and keys")

    parser = _Parser(prog="coordinator", description="Takes jobs over HTTP and gives them to workers.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    serve = commands.add_parser("serve", parents=[shared], help="serve clients and workers")
    where = serve.add_mutually_exclusive_group()
    where.add_argument("--listen", metavar="HOST:PORT", help=f"default {configuration.DEFAULT_LISTEN}")
    where.add_argument("--fd", type=int, metavar="N", help="inherited listening socket (embedded)")
    serve.add_argument("--worker-token-fd", type=int, metavar="M", help="pipe with the worker token (embedded)")
    serve.add_argument("--tls-cert", metavar="FILE")
    serve.add_argument("--tls-key", metavar="FILE")
    serve.add_argument(
        "--behind-proxy",
        nargs="*",
        metavar="ADDRESS",
        help="a proxy at these addresses (default 127.0.0.1) adds TLS",
    )
    serve.set_defaults(command=_serve)

    serve.add_argument(
        "--store",
        metavar="URL",
        help=f"where jobs live: postgres://… or sqlite:PATH (also {STORE_VARIABLE}); default: in the state folder",
    )
    serve.add_argument("--store-pooled", action="store_true", help="PgBouncer in transaction mode is in between")

    serve.add_argument("--log-format", choices=("text", "json"), help="of the log on standard error")
    serve.add_argument("--log-level", choices=logs.LEVELS)
    serve.add_argument("--access-log", action="store_true", help="tell every request, without its content")

    cli_keys.add_parsers(commands, shared, _Parser)
    cli_usage.add_parser(commands, shared)
    cli_doctor.add_parser(commands, shared)
    cli_service.add_parser(commands, shared, _Parser)
    cli_jobs.add_parser(commands, shared, _Parser)
    cli_deploy.add_parsers(commands, shared, _Parser)
    migrate = commands.add_parser("migrate", help="copy jobs and keys into another store; an interrupted copy goes on")
    migrate.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="DIR",
        help="state folder of a coordinator, or of the worker that embeds it, or sqlite:PATH; nobody may use it",
    )
    migrate.add_argument("--to", dest="target", metavar="URL", help=f"postgres://… (also {STORE_VARIABLE}); empty")
    migrate.set_defaults(command=_migrate)
    return parser


# ---- serve --------------------------------------------------------------------------------------------------


def _serve(arguments: argparse.Namespace) -> int:
    if arguments.behind_proxy == []:
        arguments.behind_proxy = [configuration.LOOPBACK_PROXY]
    settings = configuration.merged(configuration.load(arguments.config), arguments)
    where = configuration.store_address(settings)
    logs.set_up(settings.log_format, settings.log_level, access=settings.access_log)
    _check_store(where)
    embedded = arguments.fd is not None
    if embedded != (arguments.worker_token_fd is not None):
        raise Refusal("--fd and --worker-token-fd belong together; both come from the supervisor.")
    if settings.replica is not None and (embedded or not is_postgres(where)):
        raise Refusal("replica: Replicas share a PostgreSQL database; give --store postgres://…, or leave it out.")
    cert = Path(settings.tls_cert) if settings.tls_cert else None
    key = Path(settings.tls_key) if settings.tls_key else None
    check_tls(cert, key)
    listener = adopt(arguments.fd) if embedded else listen(settings.listen)
    with listener:
        check_exposure(listener, tls=cert is not None, behind_proxy=bool(settings.behind_proxy))
        state = configuration.state_dir(settings)
        doorway = open_doorway(settings.replica) if settings.replica is not None else None
        opening = partial(_opened, settings, where, state, doorway)
        coordinator = _patiently(opening, PREDECESSOR_S if embedded else 0.0)
        try:
            _prepare_keys(coordinator.keys, state, arguments.worker_token_fd)
        except BaseException:
            coordinator.close()
            raise
        client_key = state / CLIENT_KEY_FILE
        serving = Serving(
            tls_cert=cert,
            tls_key=key,
            proxies=tuple(settings.behind_proxy),
            drain_s=0.0 if embedded else settings.drain_s,
            watch_stdin=embedded,
            ready=lambda url: _say_ready(url, client_key, embedded),
        )
        return _traced(coordinator, lambda: run(coordinator, listener, serving), settings.otel)


def _opened(settings: Config, where: str, state: Path, doorway: Doorway | None) -> Coordinator:
    """A coordinator over the store at `where`. Raises Refusal, StoreError, OSError."""
    # Imported here so that a refusal before it costs no imports; starlette alone takes 40 ms.
    from coordinator.app import Coordinator

    pooled = settings.store_pooled
    try:
        return Coordinator(
            state,
            Limits(job_s=settings.job_s),
            settings.studio_models,
            open_store=lambda: open_store(where, state / STORE_FILE, pooled=pooled),
            open_register=lambda: open_register(where, state / FILE_NAME, pooled=pooled),
            doorway=doorway,
            open_blobs=lambda: open_blobs(settings.blobs, state / BLOB_FOLDER),
            undelivered_s=settings.privacy.undelivered_s,
            settings=DispatchSettings(
                max_queued=settings.max_queued, max_queued_per_tenant=settings.max_queued_per_tenant
            ),
        )
    except BlobsRefusal as error:
        raise Refusal(str(error)) from None


def _traced(coordinator: Coordinator, serving: Callable[[], int], otel: OtelConfig) -> int:
    """Serve with what `[otel]` asks for. Raises TraceRefusal."""
    try:
        traces = open_traces(otel)
    except BaseException:
        coordinator.close()
        raise
    coordinator.parts.dispatcher.attempts.traces = traces
    try:
        return serving()
    finally:
        traces.close()


def _check_store(where: str) -> None:
    """Raises Refusal before anything is opened."""
    try:
        check_address(where)
        if is_postgres(where):
            require_psycopg()
    except StoreError as error:
        raise Refusal(str(error)) from None


def _patiently(opening: Callable[[], T], patience_s: float) -> T:
    """Wait for the coordinator of a supervisor that was killed a moment ago to let go of the store."""
    until = time.monotonic() + patience_s
    while True:
        try:
            return opening()
        except StoreBusy:
            if time.monotonic() >= until:
                raise
        time.sleep(0.05)


def _prepare_keys(keys: Keys, state: Path, token_fd: int | None) -> None:
    """Every start has a client key in a file, and a worker token: from the supervisor's pipe, or in a file."""
    if secret_file(state / CLIENT_KEY_FILE, keys, "client", "first client key"):
        log.info("Made a client key: it lies in %s.", state / CLIENT_KEY_FILE)
    if token_fd is not None:
        keys.admit_for_this_boot(_read_token(token_fd), "worker", name="embedded worker")
    elif secret_file(state / WORKER_TOKEN_FILE, keys, "worker", "first worker token"):
        log.info("Made a worker token: it lies in %s.", state / WORKER_TOKEN_FILE)


def _read_token(descriptor: int) -> str:
    """Read the worker token to the end of the pipe. Raises Refusal."""
    try:
        with os.fdopen(descriptor, "rb") as pipe:
            token = pipe.read(MAX_TOKEN_BYTES + 1).strip()
    except OSError as error:
        raise Refusal(f"--worker-token-fd {descriptor} cannot be read: {error.strerror}.") from None
    if not 16 <= len(token) <= MAX_TOKEN_BYTES or not token.isascii():
        raise Refusal(f"--worker-token-fd {descriptor} held no token of 16 to {MAX_TOKEN_BYTES} characters.")
    return token.decode("ascii")


def _say_ready(url: str, client_key: Path, embedded: bool) -> None:
    if embedded:
        print(ready_line(url, client_key), flush=True)
    else:
        notify("READY=1")
        print(f"Serving {url}/v1 with the client key in {client_key}", flush=True)


# ---- migrate ------------------------------------------------------------------------------------------------


def _migrate(arguments: argparse.Namespace) -> int:
    target = arguments.target or os.environ.get(STORE_VARIABLE, "")
    source = _source(arguments.source)
    if not is_postgres(target):
        raise Refusal("--to: Expected postgres://USER@HOST/DATABASE.")
    _check_store(target)
    from coordinator.store.moving import move

    counts = move(source, target, lambda text: print(text, file=sys.stderr))
    print(", ".join(f"{count} {table}" for table, count in counts.items()), "copied and counted on both sides.")
    files = source.parent / BLOB_FOLDER
    if files.is_dir():
        print(f"Files of jobs stay in {files}: serve with this state folder, or give [blobs] url a copy of them.")
    return OK


def _source(where: str) -> Path:
    """The file to copy from: named, or in a state folder. Raises Refusal."""
    if where.startswith(SQLITE):
        return Path(where.removeprefix(SQLITE))
    folder = Path(where)
    for path in (folder / STORE_FILE, folder / EMBEDDED_FOLDER / STORE_FILE):
        if path.is_file():
            return path
    raise Refusal(f"--from: {where}: Expected a state folder with {STORE_FILE}, or sqlite:PATH.")
