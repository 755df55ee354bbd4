"""Model files against their digests, before an engine sees them.

ctranslate2 loads a model with flipped bits and answers nonsense (5 of 6 flips in a header went unnoticed), so the
files are judged here. A file is hashed once and again whenever (inode, size, mtime_ns) changes; silent bit rot under
unchanged metadata is found only by a rehash.

The digest of a folder is the sha256 of its listing in the format of `sha256sum`: one line `HEX  NAME\\n` for each
regular file below it, names relative with forward slashes, sorted by their bytes. By hand:

    cd FOLDER && find -L . -type f -printf '%P\\0' | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import trio

from protocol.faults import refuse
from protocol.ids import model_revision
from supervisor.host.work import ModelSpec

CHUNK_BYTES = 4 * 2**20  # a cancel is seen between two chunks: a few milliseconds
# Entries beyond this are dropped, oldest first: files that were deleted leave theirs behind.
MAX_REMEMBERED = 10_000

Checkpoint = Callable[[int], None]  # called with the bytes just read; raises to give up


class _Known(msgspec.Struct, frozen=True):
    """A digest and the file state that it was computed from."""

    inode: int
    size: int
    mtime_ns: int
    sha256: str


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(dict[str, _Known])


def hash_file(path: Path, checkpoint: Checkpoint = lambda _bytes: None) -> str:
    """Return the sha256 hex of a file. Raises OSError, and whatever `checkpoint` raises."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            checkpoint(count)
    return digest.hexdigest()


def folder_digest(files: Mapping[str, str]) -> str:
    """Return the digest of a folder from relative name -> sha256 hex; see the module's docstring."""
    names = sorted(files, key=os.fsencode)
    listing = b"".join(f"{files[name]}  ".encode() + os.fsencode(name) + b"\n" for name in names)
    return hashlib.sha256(listing).hexdigest()


def folder_files(folder: Path) -> dict[str, Path]:
    """Relative name -> path of every regular file below `folder`; links to files are followed, to folders not."""
    found: dict[str, Path] = {}
    for parent, _folders, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if path.is_file():
                found[path.relative_to(folder).as_posix()] = path
    return found


class Digests:
    """Remembers digests of files across restarts.

    Args:
        path: JSON file in the state folder; None remembers for this process only. A damaged file is ignored: all
            that it costs is hashing again.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._known: dict[str, _Known] = {}
        self._changed = False
        if path is not None:
            with contextlib.suppress(OSError, msgspec.MsgspecError):
                self._known = _decoder.decode(path.read_bytes())

    async def verify(self, spec: ModelSpec) -> str:
        """Check the model's files against `spec.sha256` and return the model's revision.

        Raises:
            FaultError: `model_corrupt` naming the file and both digests; `load_failed` when a file cannot be read
                or a digest is given for a role that names no file.

        Cancellation: at once; hashing stops at the next chunk, if the disk ever gives it. Finished digests are kept.
        """
        for role in spec.sha256:
            if role not in spec.model.files:
                raise refuse("load_failed", f"sha256 names the role {role!r}, but no file has it.", f"sha256.{role}")
        found = {role: await self._role(spec, role, Path(path)) for role, path in spec.model.files.items()}
        model = spec.model
        config = {
            "engine": spec.engine.module,
            "backend": model.backend,
            "device": model.device,
            "devices": list(model.devices),
            "options": dict(model.options),
        }
        return model_revision(found, config)

    async def _role(self, spec: ModelSpec, role: str, path: Path) -> str:
        try:
            found = await trio.to_thread.run_sync(
                self.digest, path, lambda _bytes: trio.from_thread.check_cancelled(), abandon_on_cancel=True
            )
        except OSError as error:
            sentence = f"Model {spec.name!r}: {path} cannot be read: {error.strerror or error}."
            raise refuse("load_failed", sentence, f"files.{role}") from None
        wanted = spec.sha256.get(role, "").lower()
        if wanted and found != wanted:
            raise refuse(
                "model_corrupt",
                f"Model {spec.name!r}: {path} has the sha256 {found} where {wanted} was expected; it is damaged or"
                " another version: pull it again, or correct `sha256` in worker.toml.",
                f"sha256.{role}",
                path=str(path),
                expected=wanted,
                found=found,
            )
        return found

    def digest(self, path: Path, checkpoint: Checkpoint = lambda _bytes: None) -> str:
        """Return the digest of a file or folder, hashing what is not known. Blocking; safe from any thread.

        Raises:
            OSError: something cannot be read.
        """
        try:
            if not path.is_dir():
                return self._file(path, checkpoint)
            files = folder_files(path)
            if not files:
                raise FileNotFoundError(2, "the folder holds no file", str(path))
            return folder_digest({name: self._file(file, checkpoint) for name, file in files.items()})
        finally:
            self.save()

    def _file(self, path: Path, checkpoint: Checkpoint) -> str:
        key = str(path.resolve())
        before = path.stat()
        with self._lock:
            known = self._known.get(key)
        if known is not None and _is_of(known, before):
            return known.sha256
        found = hash_file(path, checkpoint)
        self._remember(key, before, found)
        return found

    def _remember(self, key: str, state: os.stat_result, found: str) -> None:
        with self._lock:
            self._known.pop(key, None)  # to the end of the order: the youngest
            self._known[key] = _Known(state.st_ino, state.st_size, state.st_mtime_ns, found)
            while len(self._known) > MAX_REMEMBERED:
                del self._known[next(iter(self._known))]
            self._changed = True

    def save(self) -> None:
        """Write what is remembered, atomically. A full disk is no reason to refuse a good model."""
        with self._lock:
            if self._path is None or not self._changed:
                return
            self._changed = False
            data = _encoder.encode(self._known)
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._path.parent, prefix=".digests-", delete=False) as file:
                file.write(data)
            Path(file.name).replace(self._path)


def _is_of(known: _Known, state: os.stat_result) -> bool:
    return (known.inode, known.size, known.mtime_ns) == (state.st_ino, state.st_size, state.st_mtime_ns)


async def verify(spec: ModelSpec, digests: Digests | None = None) -> str:
    """`Digests.verify` on `digests`, or on a fresh memory."""
    return await (digests or Digests()).verify(spec)
