"""The state folder: one supervisor at a time, and what outlives it.

lock            flock'ed while a supervisor runs; names its pid
worker-id       made at the first start, so that a renamed or re-addressed box stays the same worker
digests.json    sha256 of model files already read
verdicts.json   probes that were passed, and under which circumstances
endpoint.json   where the embedded coordinator answers and where the client key lies; gone when it is not up
quarantines.json  models that are out of service, and until when
gpus.json       GPUs that are out of service, and why
peaks.json      GPU memory that models were seen to take
paces.json      how fast models were seen to run
holds.json      why no jobs are taken, and until when
worker.db       claims and results that the coordinator has not acknowledged
outbox/         files of these results
control.sock    the owner's socket
coordinator/    state of the embedded coordinator
instances/      where engines work: scratch, inputs and outputs of their jobs
probes/         scratch of probes
children/       what was started, for the next life to clear up
incidents/      reports of the latest bad ends of engines
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from protocol.ids import is_safe_id
from supervisor.errors import IdentityHeld, NoPermission, SupervisorError
from supervisor.host.removal import empty_tree


class StateFolder:
    """Paths below the state folder; made by `hold_state`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.digests = root / "digests.json"
        self.verdicts = root / "verdicts.json"
        self.endpoint = root / "endpoint.json"
        self.coordinator = root / "coordinator"
        self.instances = root / "instances"
        self.probes = root / "probes"
        self.children = root / "children"
        self.incidents = root / "incidents"
        self.quarantines = root / "quarantines.json"
        self.gpus = root / "gpus.json"
        self.peaks = root / "peaks.json"
        self.paces = root / "paces.json"
        self.holds = root / "holds.json"
        self.records = root / "worker.db"
        self.outbox = root / "outbox"

    def worker_id(self, configured: str) -> str:
        """The configured name, else the one made at the first start."""
        if configured:
            return configured
        path = self.root / "worker-id"
        with contextlib.suppress(OSError):
            known = path.read_text().strip()
            if is_safe_id(known):
                return known
        host = "".join(char for char in socket.gethostname().split(".")[0] if char.isalnum() or char == "-")
        made = f"{host.strip('-')[:40] or 'worker'}-{secrets.token_hex(4)}"
        write_atomically(path, made.encode() + b"\n")
        return made

    def empty_probes(self) -> Path:
        """Remove what an earlier life, killed while it probed, left of its probes."""
        return _emptied(self.probes)


def _emptied(folder: Path) -> Path:
    empty_tree(folder)
    _let_engines_through(folder)
    return folder


def _let_engines_through(folder: Path) -> None:
    """As root, engines have a user of their own: it may pass through to its own folder, and list nothing."""
    if sys.platform.startswith("linux") and os.geteuid() == 0:
        folder.chmod(0o711)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file as a whole; readers see the old or the new one. Mode 0600."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        partial.replace(path)
    except OSError:  # the disk is full: leave it no fuller
        partial.unlink(missing_ok=True)
        raise


def write_endpoint(path: Path, url: str, client_key_file: str) -> None:
    """Tell other programs where to find the embedded coordinator."""
    fields = {"url": url, "client_key_file": client_key_file, "pid": os.getpid()}
    write_atomically(path, msgspec.json.format(msgspec.json.encode(fields)) + b"\n")


@contextlib.contextmanager
def hold_state(root: Path) -> Iterator[StateFolder]:
    """Take the state folder for this process alone.

    Raises:
        IdentityHeld: another process has it.
        NoPermission: it cannot be made or opened.
        SupervisorError: the disk is full.
    """
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        _let_engines_through(root)
        descriptor = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise NoPermission(
            f"The state folder {root} cannot be used: {error.strerror}; "
            "give this user the folder, or choose another one with [worker] state_dir."
        ) from None
    try:
        _lock(descriptor, root)
        _sign(descriptor, root)
        yield StateFolder(root)
    finally:
        os.close(descriptor)


def _sign(descriptor: int, root: Path) -> None:
    """Write our pid into the lock. This is also the first byte that a full disk refuses."""
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    except OSError as error:
        raise SupervisorError(
            f"The state folder {root} cannot be written: {error.strerror}; make room there and start again."
        ) from None


def _lock(descriptor: int, root: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise NoPermission(f"The state folder {root} cannot be locked: {error.strerror}.") from None
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
        raise IdentityHeld(
            f"The state folder {root} is held by the supervisor with pid {holder or 'unknown'}; "
            "stop that one, or give this one another [worker] state_dir."
        ) from None
