"""The models folder: what was pulled, whence, who uses it.

    MODELS/NAME/...               the files of one model, and nothing else: some engines take the folder as a whole
    MODELS/.pulling-NAME/         a pull at work or interrupted; the same command goes on with it
    MODELS/.replaced-NAME/        an older model on its way out
    MODELS/.store/manifests/NAME  what is in NAME: files, sizes, sha256, source, revision, when
    MODELS/.store/pulls/NAME      locked (flock) while a pull of NAME is at work; names its pid, and its worker.toml
    MODELS/.store/uses/NAME       locked, shared, by each supervisor that has loaded NAME; its mtime is the last load
    MODELS/.store/failures/NAME   why the last pull of NAME failed; gone when one succeeds
    MODELS/.store/edit            locked while worker.toml is edited after a pull

Locks belong to the kernel: whoever is killed lets go of them. Everything is written by rename, so that a kill at any
moment leaves the old or the new state, and the same command finishes what was begun:

1. the pull child fetches into `.pulling-NAME`; a kill here leaves parts, which are resumed
2. the manifest is written; a kill here leaves whole files in `.pulling-NAME`, which are hashed and not fetched again
3. `.pulling-NAME` becomes `NAME`; a kill here leaves a model with a manifest and without an entry in worker.toml,
   which the next pull of the same source adopts
4. worker.toml gets its entry
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from supervisor.errors import ExitCode, NoPermission, SupervisorError
from supervisor.model_guess import Guess
from supervisor.pull_wire import SourceKind
from supervisor.state import write_atomically

STORE = ".store"
PULLING, REPLACED = ".pulling-", ".replaced-"


class StoreError(SupervisorError):
    """A command on models cannot do what was asked; the text is a sentence with the cure."""

    exit_code = ExitCode.FAILED


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a model."""

    size_bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a pull brought.

    Attributes:
        name: public name.
        source, file: as they were asked for, secrets of a URL left out.
        origin: where the files came from, with the commit of a repository.
        revision: that commit; "" for other sources.
        pulled_at: seconds since 1970.
        files: relative name -> size and digest.
        guess: which engine takes it, and its files by role.
        config: the worker.toml that it was pulled for.
    """

    name: str
    kind: SourceKind
    source: str
    file: str = ""
    origin: str
    revision: str = ""
    pulled_at: float
    files: dict[str, Kept]
    guess: Guess
    config: str = ""

    @property
    def digests(self) -> dict[str, str]:
        """Relative name -> sha256 hex."""
        return {name: kept.sha256 for name, kept in self.files.items()}


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a pull failed, for whoever misses the model later."""

    message: str
    at: float


class Store:
    """One models folder.

    Args:
        models: the folder; made by `open_for_writing`, reading wants nothing to exist.
    """

    def __init__(self, models: Path) -> None:
        self.models = models
        self._own = models / STORE

    def open_for_writing(self) -> None:
        """Make the folders. Raises NoPermission."""
        try:
            for name in ("manifests", "pulls", "uses", "failures"):
                (self._own / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise NoPermission(
                f"{self.models} cannot be made: {error.strerror}; name another with --models-dir."
            ) from None

    def folder(self, key: str) -> Path:
        """Where the files of a model are, or would be."""
        return self.models / key

    def staging(self, key: str) -> Path:
        """Where a pull of it collects its files."""
        return self.models / f"{PULLING}{key}"

    def keys(self) -> list[str]:
        """Folder names of the models that are here, sorted; with and without a manifest."""
        return [path.name for path in self._folders() if not path.name.startswith(".")]

    def interrupted(self) -> list[str]:
        """Folder names of models that a pull has begun with and not brought."""
        return [path.name.removeprefix(PULLING) for path in self._folders() if path.name.startswith(PULLING)]

    def replaced(self) -> list[Path]:
        """Folders that somebody was killed over while he deleted them."""
        return [path for path in self._folders() if path.name.startswith(REPLACED)]

    def _folders(self) -> list[Path]:
        with contextlib.suppress(OSError):
            return sorted(path for path in self.models.iterdir() if path.is_dir() and not path.is_symlink())
        return []

    # ---- what is known about a model

    def manifest(self, key: str) -> Manifest | None:
        """None when there is none, or it is damaged: then nothing is known about these files."""
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            return msgspec.json.decode((self._own / "manifests" / key).read_bytes(), type=Manifest)
        return None

    def failure(self, key: str) -> Failure | None:
        """Why the last pull failed."""
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            return msgspec.json.decode((self._own / "failures" / key).read_bytes(), type=Failure)
        return None

    def note_failure(self, key: str, message: str) -> None:
        """Keep the sentence for the fault of a load that will miss the model. A full disk may keep it from us."""
        data = msgspec.json.encode(Failure(message=message, at=time.time()))
        with contextlib.suppress(OSError):
            write_atomically(self._own / "failures" / key, data)

    def last_loaded(self, key: str) -> float | None:
        """When a supervisor last loaded it, seconds since 1970; None for never."""
        with contextlib.suppress(OSError):
            return (self._own / "uses" / key).stat().st_mtime or None
        return None

    # ---- changes

    def settle(self, key: str, manifest: Manifest) -> None:
        """Give the collected files their place; an older model of that name goes only after the new one is whole.

        The caller holds `pulling(key)`.
        """
        folder, old = self.folder(key), self.models / f"{REPLACED}{key}"
        shutil.rmtree(old, ignore_errors=True)
        write_atomically(
            self._own / "manifests" / key, msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"
        )
        if folder.exists():
            folder.rename(old)
        self.staging(key).rename(folder)
        (self._own / "failures" / key).unlink(missing_ok=True)
        shutil.rmtree(old, ignore_errors=True)

    def remove(self, key: str, named: Callable[[], bool] = lambda: False) -> bool:
        """Delete a model that no supervisor has loaded and no pull works on; returns whether it was so.

        Args:
            named: asked under the locks: whether a worker.toml names the model by now. A pull may have entered it
                since somebody chose it for deletion; it cannot do so between the answer and the deletion.

        Raises:
            OSError: it cannot be moved away.
        """
        old = self.models / f"{REPLACED}{key}"
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(self.pulling(key, self.begun_for(key)))
            except StoreError:
                return False
            if not held.enter_context(self._alone(key)) or named():
                return False
            shutil.rmtree(old, ignore_errors=True)
            for folder in (self.folder(key), self.staging(key)):
                if folder.exists():
                    folder.rename(old)
                    shutil.rmtree(old)
            with contextlib.suppress(OSError):  # should it come again, it was never loaded
                os.utime(self._own / "uses" / key, (0, 0))
            for kind in ("manifests", "failures"):
                (self._own / kind / key).unlink(missing_ok=True)
        return True

    def remove_staging(self, key: str) -> bool:
        """Delete what an interrupted pull left; returns False when a pull is at work on it."""
        try:
            with self.pulling(key):
                shutil.rmtree(self.staging(key), ignore_errors=True)
        except StoreError:
            return False
        return True

    # ---- locks

    @contextlib.contextmanager
    def pulling(self, key: str, config: str = "") -> Iterator[None]:
        """Be the only pull of this model.

        Args:
            config: the worker.toml that it is for; see `begun_for`.

        Raises:
            StoreError: another one is at work; the sentence names its pid.
        """
        self.open_for_writing()
        lock = os.open(self._own / "pulls" / key, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pid = os.pread(lock, 32, 0).decode(errors="replace").partition("\n")[0] or "unknown"
                raise StoreError(
                    f"Another pull of {key} is at work (pid {pid}); wait for it, or take another --name."
                ) from None
            os.ftruncate(lock, 0)
            with contextlib.suppress(OSError):  # a full disk: the lock holds without a name on it
                os.pwrite(lock, f"{os.getpid()}\n{config}\n".encode(errors="surrogateescape"), 0)
            yield
        finally:
            os.close(lock)

    def begun_for(self, key: str) -> str:
        """The worker.toml that the last pull of it was for; "" when that is not known."""
        with contextlib.suppress(OSError):
            text = (self._own / "pulls" / key).read_bytes().decode(errors="surrogateescape")
            return text.partition("\n")[2].removesuffix("\n")
        return ""

    def is_pulled_now(self, key: str) -> bool:
        """Whether a pull of it is at work."""
        return _is_locked(self._own / "pulls" / key)

    def is_loaded(self, key: str) -> bool:
        """Whether a running supervisor has loaded it."""
        return _is_locked(self._own / "uses" / key)

    def use(self, key: str) -> int | None:
        """Note a load, and keep the model from being deleted until the returned descriptor is closed.

        Returns None while somebody holds the model alone: it is about to be deleted, or was asked about just now.

        Raises:
            OSError: the store cannot be written by this user.
        """
        lock = os.open(self._own / "uses" / key, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        self.note_load(lock)
        return lock

    @staticmethod
    def note_load(lock: int) -> None:
        """It is loaded once more. The file may be another user's, whose loads are then the ones that count."""
        with contextlib.suppress(OSError):
            os.utime(lock)

    @contextlib.contextmanager
    def _alone(self, key: str) -> Iterator[bool]:
        """For deleting: whether nobody has it loaded, and none will until the block ends."""
        lock = os.open(self._own / "uses" / key, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True
        finally:
            os.close(lock)

    @contextlib.contextmanager
    def editing(self) -> Iterator[None]:
        """Be the only pull that edits worker.toml. Blocks for as long as another one needs: milliseconds."""
        with (self._own / "edit").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _is_locked(path: Path) -> bool:
    """Whether somebody else holds the lock. Asking holds it for an instant; whoever loads tries again."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def home_of(path: Path) -> tuple[Store, str] | None:
    """The store and the folder name of the model that a path belongs to; None for files that were not pulled."""
    for folder in (path, *path.parents):
        if not folder.name.startswith(".") and (folder.parent / STORE).is_dir():
            return Store(folder.parent), folder.name
    return None


def folder_bytes(folder: Path) -> int:
    """Size of all files below a folder."""
    total = 0
    for parent, _folders, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return total
