"""Where the instances of one model work: their scratch folders, and inputs and outputs of their attempts.

    m0/            the model's ground                      may be passed through, not listed
       i1/         scratch of its first instance           the engine writes
       in/J.1/     inputs of attempt 1 of job J            the supervisor writes, the engine only reads
       out/J.1/    its outputs                             the engine writes

Theory of operation. Each engine is granted its own ground and nobody else's. Everything below `i1` and `out` belongs
to whoever owns the engine: it may hold links, pipes, hard links to somebody's secret, files that grow while they are
read, and folders that are something else a moment later. So the supervisor keeps the descriptors of an attempt's two
folders from their making to their removal, opens files only below them and never through a link, and believes
nothing of a file but what it sees of the very descriptor it reads from.

When the supervisor is root and its engines are not, `out/J.1` and `i1` are given to their user. The group stays
root's, with the same rights: an engine that could not be dropped works as root without capabilities there.
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

from protocol.engine_wire import OutputFile
from protocol.faults import refuse
from supervisor.host.engine_user import User, engine_user
from supervisor.host.removal import remove_below, remove_tree

INPUTS, OUTPUTS = "in", "out"
_BY_DESCRIPTOR = sys.platform != "win32"
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | _NOFOLLOW
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _NOFOLLOW | getattr(os, "O_BINARY", 0)
_OLD_FILE = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _NOFOLLOW | getattr(os, "O_BINARY", 0)


class Ground:
    """The ground of one model.

    Args:
        root: absolute; the folder that holds it is the supervisor's own.
        limit_bytes: a larger output is refused; 0 means no limit.
        user: whom the engines run as; None means as we do.
    """

    def __init__(self, root: Path, *, limit_bytes: int = 0, user: User | str | None = "found") -> None:
        self.root = root
        self.inputs, self.outputs = root / INPUTS, root / OUTPUTS
        self.limit_bytes = limit_bytes
        self.user = engine_user() if isinstance(user, str) else user

    def instance(self, number: int) -> Path:
        """Scratch folder of an instance."""
        return self.root / f"i{number}"

    def make(self) -> None:
        """Make what all instances share; nothing when it is there. Raises OSError."""
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        for folder in (self.inputs, self.outputs):
            folder.mkdir(exist_ok=True, mode=0o700)
        if self.user is None:
            return
        for folder in (self.root.parent, self.root, self.outputs):
            folder.chmod(0o711)
        fd = os.open(self.inputs, _FOLDER)
        try:
            os.fchown(fd, 0, self.user.gid)
            os.fchmod(fd, 0o750)
        finally:
            os.close(fd)

    def make_instance(self, number: int) -> Path:
        """Make the scratch folder of an instance. Raises OSError."""
        self.make()
        folder = self.instance(number)
        folder.mkdir(mode=0o700)
        give(folder, self.user)
        return folder

    def open_attempt(self, name: str) -> Attempt:
        """Make the two folders of an attempt anew. Raises OSError."""
        _plain(name)
        try:
            return Attempt(self, name)
        except FileNotFoundError:
            self.make()
        except FileExistsError:  # only left over from an attempt that was fenced a moment ago
            self.remove_attempt(name)
        return Attempt(self, name)

    def remove_attempt(self, name: str) -> bool:
        """Remove the folders of an attempt; blocks. Returns whether they are gone."""
        _plain(name)
        gone = []
        for folder in (self.inputs, self.outputs):
            if not _BY_DESCRIPTOR:
                gone.append(remove_tree(folder / name))
                continue
            try:
                fd = os.open(folder, _FOLDER)
            except FileNotFoundError:
                continue
            try:
                gone.append(remove_below(fd, name))
            finally:
                os.close(fd)
        return all(gone)


class Attempt:
    """The folders of one attempt; made by `Ground.open_attempt`. `close` leaves them, `remove` removes them.

    Attributes:
        inputs, outputs: their paths, for the engine.
    """

    def __init__(self, ground: Ground, name: str) -> None:
        self.name = name
        self.inputs, self.outputs = ground.inputs / name, ground.outputs / name
        self._ground = ground
        readers = None if ground.user is None else User(0, ground.user.gid)
        self._in = _made(self.inputs, 0o750, readers)
        try:
            self._out = _made(self.outputs, *_given(ground.user))
        except OSError:
            _close(self._in)
            raise

    def create_input(self, name: str) -> int:
        """A descriptor to write an input to; what was there is gone. Raises OSError."""
        _plain(name)
        fd = _open(self.inputs, self._in, name, _NEW_FILE)
        try:
            if self._ground.user is not None:
                os.fchown(fd, 0, self._ground.user.gid)
            if _BY_DESCRIPTOR:
                os.fchmod(fd, 0o640)
        except OSError:
            os.close(fd)
            raise
        return fd

    def open_output(self, file: OutputFile) -> int:
        """A descriptor to read an output from, once it is what the engine said.

        Raises:
            FaultError: engine_protocol: the name is no plain name, or there is no such regular file of this size that
                is only here. The file's content is the reader's to check.
        """
        name = file.name
        if not _is_plain(name):
            raise refuse("engine_protocol", f"The engine named an output {name!r}, which is not a plain file name.")
        try:
            fd = _open(self.outputs, self._out, name, _OLD_FILE)
        except OSError as error:
            raise refuse("engine_protocol", f"The output {name!r} cannot be opened: {error.strerror}.") from None
        if wrong := self._wrong_with(os.fstat(fd), file):
            os.close(fd)
            raise refuse("engine_protocol", f"The output {name!r} {wrong}.")
        return fd

    def _wrong_with(self, state: os.stat_result, file: OutputFile) -> str:
        if not stat.S_ISREG(state.st_mode):
            return "is not a regular file"
        if state.st_nlink != 1:  # a name for a file that may be somebody else's
            return f"has {state.st_nlink} names"
        if state.st_size != file.size:
            return f"has {state.st_size} bytes, not {file.size}"
        if self._ground.limit_bytes and state.st_size > self._ground.limit_bytes:
            return f"has {state.st_size} bytes, more than the {self._ground.limit_bytes} of limits.scratch_gb"
        return ""

    def close(self) -> None:
        """Let go of the folders."""
        _close(self._in)
        _close(self._out)
        self._in = self._out = -1

    def remove(self) -> bool:
        """Remove the folders and all in them; blocks. Returns whether they are gone."""
        self.close()
        return self._ground.remove_attempt(self.name)


def give(folder: Path, user: User | None) -> None:
    """Let the engines' user own a folder. Raises OSError: it is a link, or not there."""
    if user is None:
        return
    fd = os.open(folder, _FOLDER)
    try:
        mode, owner = _given(user)
        assert owner is not None
        os.fchown(fd, owner.uid, owner.gid)
        os.fchmod(fd, mode)
    finally:
        os.close(fd)


def _given(user: User | None) -> tuple[int, User | None]:
    return (0o700, None) if user is None else (0o770, User(user.uid, 0))


def _made(folder: Path, mode: int, owner: User | None) -> int:
    """Make a folder and open it; -1 where folders cannot be opened."""
    if not _BY_DESCRIPTOR:
        folder.mkdir()
        return -1
    above = os.open(folder.parent, _FOLDER)
    try:
        os.mkdir(folder.name, 0o700, dir_fd=above)
        fd = os.open(folder.name, _FOLDER, dir_fd=above)
    finally:
        os.close(above)
    try:
        if owner is not None:
            os.fchown(fd, *owner)
            os.fchmod(fd, mode)
    except OSError:
        os.close(fd)
        raise
    return fd


def _open(folder: Path, fd: int, name: str, flags: int) -> int:
    if not _BY_DESCRIPTOR:
        return os.open(folder / name, flags, 0o600)
    return os.open(name, flags, 0o600, dir_fd=fd)


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)


def _is_plain(name: str) -> bool:
    return not ("/" in name or "\0" in name or os.sep in name or name in ("", ".", ".."))


def _plain(name: str) -> None:
    if not _is_plain(name):
        raise OSError(f"{name!r} is not a plain name")
