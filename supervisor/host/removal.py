"""Removing a folder that an engine owned, and may have prepared for whoever removes it.

Theory of operation. Only names below an open folder are touched, never a path, and no link is followed: what an
engine swaps for a link while we look at it costs us a failed call and nothing else. A chain of a hundred thousand
folders, one in the other, would break a recursive removal (and has no path any more that fits a call), so nothing
recurses: folders are lifted to the top until there is nothing below. Names are read one by one, not as a list:
millions of them must not become the supervisor's memory. Folders without permissions get them back first.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import sys
import time
from pathlib import Path

# An engine that still runs can make files as fast as they are removed; then the rest goes when it has ended.
PATIENCE_S = 120.0
_OPEN_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_BY_DESCRIPTOR = sys.platform != "win32"


def remove_tree(folder: Path, *, patience_s: float = PATIENCE_S) -> bool:
    """Remove a folder and all in it; blocks. Returns whether it is gone; nothing is raised.

    The folders above it are the supervisor's own and trusted.
    """
    if not _BY_DESCRIPTOR:
        shutil.rmtree(folder, ignore_errors=True)
        return not folder.exists()
    try:
        parent = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        return error.errno == errno.ENOENT
    try:
        return _removed(parent, folder.name, time.monotonic() + patience_s)
    finally:
        os.close(parent)


def remove_below(folder: int, name: str, *, patience_s: float = PATIENCE_S) -> bool:
    """As `remove_tree`, for a name in an open folder."""
    return _removed(folder, name, time.monotonic() + patience_s)


def empty_tree(folder: Path, *, patience_s: float = PATIENCE_S) -> bool:
    """Remove a folder and make it anew, for its owner alone. Raises OSError when it cannot be made."""
    gone = remove_tree(folder, patience_s=patience_s)
    folder.mkdir(parents=True, mode=0o700, exist_ok=True)
    return gone


def _removed(parent: int, name: str, until: float) -> bool:
    lifted = 0
    while True:
        if _remove_one(parent, name):
            return True
        if time.monotonic() > until:
            return False
        try:
            top = _open(parent, name)
        except OSError as error:
            return error.errno == errno.ENOENT
        try:
            done, lifted = _pass(top, lifted, until)
        finally:
            os.close(top)
        if not done:
            return _remove_one(parent, name)


def _pass(top: int, lifted: int, until: float) -> tuple[bool, int]:
    """Go once over the names in `top`; whether anything was removed or lifted, and the next number for lifting."""
    done = False
    with contextlib.suppress(OSError), os.scandir(top) as entries:
        for entry in entries:
            if time.monotonic() > until:
                break
            if _remove_one(top, entry.name):
                done = True
                continue
            with contextlib.suppress(OSError):
                below = _open(top, entry.name)
                try:
                    moved, lifted = _lift(below, top, lifted)
                finally:
                    os.close(below)
                done = _remove_one(top, entry.name) or moved or done
    return done, lifted


def _lift(below: int, top: int, lifted: int) -> tuple[bool, int]:
    """Remove what is in `below`; folders that are not empty go to `top`."""
    done = False
    with os.scandir(below) as entries:
        for entry in entries:
            if _remove_one(below, entry.name):
                done = True
                continue
            lifted += 1
            with contextlib.suppress(OSError):
                os.close(_open(below, entry.name))  # a folder that may not be written cannot be moved either
                os.rename(entry.name, f".{lifted}-{os.getpid()}", src_dir_fd=below, dst_dir_fd=top)
                done = True
    return done, lifted


def _remove_one(folder: int, name: str) -> bool:
    """Remove a file or an empty folder; False when it is a folder with something in it, or cannot be removed."""
    try:
        os.unlink(name, dir_fd=folder)
    except FileNotFoundError:
        return True
    except (IsADirectoryError, PermissionError):  # the latter is how macOS says the former
        try:
            os.rmdir(name, dir_fd=folder)
        except FileNotFoundError:
            return True
        except OSError:
            return False
    except OSError:
        return False
    return True


def _open(folder: int, name: str) -> int:
    """Open a folder in a folder, with all rights for its owner. Raises OSError: a link, gone, or somebody else's."""
    try:
        fd = os.open(name, _OPEN_FOLDER, dir_fd=folder)
    except PermissionError:
        _unlock(folder, name)
        fd = os.open(name, _OPEN_FOLDER, dir_fd=folder)
    try:
        if stat.S_IMODE(os.fstat(fd).st_mode) & 0o700 != 0o700:
            os.fchmod(fd, 0o700)
    except OSError:
        os.close(fd)
        raise
    return fd


def _unlock(folder: int, name: str) -> None:
    path_only = getattr(os, "O_PATH", None)
    if path_only is None:
        os.chmod(name, 0o700, dir_fd=folder, follow_symlinks=False)
        return
    fd = os.open(name, path_only | _OPEN_FOLDER, dir_fd=folder)
    try:
        os.chmod(f"/proc/self/fd/{fd}", 0o700)  # fchmod refuses such a descriptor
    finally:
        os.close(fd)
