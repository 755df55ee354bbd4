"""A file system for SQLite whose power can be cut: what was not synced may be lost, in part and out of order.

Made with apsw, whose connections speak the same SQL text as the standard library's. Files live in memory. At a cut,
of each write since the file's last sync a prefix of sectors survives, or nothing: the dice say which, and not in the
order in which they were written, as disks do.
"""

from __future__ import annotations

import random
import uuid
from pathlib import Path

import apsw

SECTOR = 512


class Disk:
    """Files by name: what is durable, and what was written since.

    Args:
        room: bytes that all files together may have; then it is full.
    """

    def __init__(self, seed: int, room: int | None = None) -> None:
        self.name = f"power-{uuid.uuid4().hex}"
        self.dice = random.Random(seed)
        self.room = room
        self.durable: dict[str, bytes] = {}
        self.files: dict[str, bytearray] = {}
        self.pending: dict[str, list[tuple[int, bytes] | int]] = {}
        self.writes = self.syncs = 0
        self.off = False
        self._vfs = _Vfs(self)

    def connect(self, path: Path) -> apsw.Connection:
        return apsw.Connection(str(path), vfs=self.name)

    def cut(self) -> None:
        """The power comes back; since it went (`off`) nothing has reached the disk any more."""
        self.off = False
        self.files = {}
        for name in [*self.durable, *(name for name in self.pending if name not in self.durable)]:
            data = bytearray(self.durable.get(name, b""))
            for write in self.pending.get(name, []):
                if self.dice.random() < 0.5:
                    continue
                if isinstance(write, int):
                    del data[write:]
                    continue
                at, piece = write
                kept = piece[: SECTOR * self.dice.randint(0, len(piece) // SECTOR + 1)]
                _put(data, at, kept)
            self.files[name] = data
        self.durable = {name: bytes(data) for name, data in self.files.items()}
        self.pending = {}

    def full(self, more: int) -> bool:
        return self.room is not None and sum(map(len, self.files.values())) + more > self.room


def _put(data: bytearray, at: int, piece: bytes) -> None:
    if len(data) < at:
        data.extend(bytes(at - len(data)))
    data[at : at + len(piece)] = piece


class _Vfs(apsw.VFS):
    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        super().__init__(disk.name, base="")

    def xOpen(self, name, flags):
        return _File(self.disk, name, flags)

    def xAccess(self, path, flags):
        return path in self.disk.files

    def xDelete(self, path, sync):
        if self.disk.off:
            return
        self.disk.files.pop(path, None)
        self.disk.durable.pop(path, None)
        self.disk.pending.pop(path, None)

    def xFullPathname(self, name):
        return name


class _File(apsw.VFSFile):
    def __init__(self, disk, name, flags):
        self.disk = disk
        self.path = name.filename() if isinstance(name, apsw.URIFilename) else (name or f"temp-{id(self)}")
        self.disk.files.setdefault(self.path, bytearray())
        flags[1] = flags[0]

    def xRead(self, amount, offset):
        return bytes(self.disk.files[self.path][offset : offset + amount])

    def xWrite(self, data, offset):
        held = self.disk.files[self.path]
        if self.disk.off:
            return
        if self.disk.full(max(0, offset + len(data) - len(held))):
            raise apsw.FullError("database or disk is full")
        self.disk.writes += 1
        _put(held, offset, data)
        self.disk.pending.setdefault(self.path, []).append((offset, data))

    def xTruncate(self, size):
        if self.disk.off:
            return
        del self.disk.files[self.path][size:]
        self.disk.pending.setdefault(self.path, []).append(size)

    def xSync(self, flags):
        if self.disk.off:
            return
        self.disk.syncs += 1
        self.disk.durable[self.path] = bytes(self.disk.files[self.path])
        self.disk.pending.pop(self.path, None)

    def xFileSize(self):
        return len(self.disk.files[self.path])

    def xClose(self):
        pass

    def xLock(self, level):
        pass

    def xUnlock(self, level):
        pass

    def xCheckReservedLock(self):
        return False

    def xFileControl(self, operation, pointer):
        return False

    def xSectorSize(self):
        return SECTOR

    def xDeviceCharacteristics(self):
        return 0
