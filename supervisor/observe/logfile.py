"""The log file: a thread of its own writes it, so that a full, slow or vanished disk costs lines and nothing else.

`put` only appends to a bounded queue. The thread writes whole lines; when it cannot, it takes back the half of a line
that got through, keeps the queue and tries again after `RETRY_S`. What does not fit into the queue is counted, and the
count is told when writing works again. The file is looked up by name before every batch: whoever renames it (logrotate,
a person) gets a new one without asking us. Lines are for reading later, not for a ledger: nothing is synced.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import threading
from collections import deque
from pathlib import Path

log = logging.getLogger(__name__)

QUEUE_BYTES = 4 * 2**20
BATCH_BYTES = 256 * 1024
RETRY_S = 5.0
CLOSE_S = 2.0  # for the last lines; a disk that needs longer does not hold up the end


class LogFile:
    """One rotated file.

    Args:
        path: absolute.
        max_bytes: the file becomes `path`.1 before it grows above this.
        keep: how many older files stay.

    Attributes:
        dropped: lines that never reached the file.
    """

    def __init__(
        self, path: Path, max_bytes: int, keep: int, *, queue_bytes: int = QUEUE_BYTES, retry_s: float = RETRY_S
    ) -> None:
        self.dropped = 0
        self._path, self._max_bytes, self._keep = path, max_bytes, keep
        self._queue_bytes, self._retry_s = queue_bytes, retry_s
        self._lines: deque[bytes] = deque()
        self._bytes = 0
        self._told = 0  # of `dropped`
        self._failing = False
        self._closing = False
        self._fd = -1
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="bulkhead-log", daemon=True)
        self._thread.start()

    def put(self, line: str) -> None:
        """Take one line, without its newline; from any thread, never blocks on the disk and never raises."""
        data = line.encode("utf-8", "backslashreplace").replace(b"\n", b"\\n") + b"\n"
        with self._wake:
            if self._closing or self._bytes + len(data) > self._queue_bytes:
                self.dropped += 1
                return
            self._lines.append(data)
            self._bytes += len(data)
            self._wake.notify()

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Write what is queued, for at most `timeout_s`; further lines are dropped."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout_s)

    # ---- the thread

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._lines or self._closing)
                lines, closing = self._batch(), self._closing
            if not lines:
                break
            if not self._wrote(lines):
                with self._wake:
                    if closing:
                        self.dropped += len(self._lines)
                        break
                    self._wake.wait_for(lambda: self._closing, self._retry_s)
        if self._fd >= 0:
            self._forget()

    def _batch(self) -> list[bytes]:
        lines: list[bytes] = []
        size = 0
        for line in self._lines:
            if lines and size + len(line) > BATCH_BYTES:
                break
            lines.append(line)
            size += len(line)
        return lines

    def _wrote(self, lines: list[bytes]) -> bool:
        """Write these lines, which head the queue, and take them off; False when the disk refused the next."""
        try:
            while lines:
                size = self._ready(len(lines[0]))
                room, part = max(self._max_bytes - size, len(lines[0])), 0
                count = 0
                while count < len(lines) and part + len(lines[count]) <= room:
                    part += len(lines[count])
                    count += 1
                self._append(b"".join(lines[:count]), size)
                del lines[:count]
                with self._wake:
                    for _ in range(count):
                        self._bytes -= len(self._lines.popleft())
        except OSError as error:
            self._trouble(error)
            return False
        self._works()
        return True

    def _ready(self, needed: int) -> int:
        """Open, look up again and rotate as needed; the size of the file that is open then."""
        if self._fd >= 0:
            opened = os.fstat(self._fd)
            try:
                named = os.stat(self._path)
            except FileNotFoundError:
                named = None
            if named is None or (named.st_dev, named.st_ino) != (opened.st_dev, opened.st_ino):
                self._forget()
            elif opened.st_size and opened.st_size + needed > self._max_bytes:
                self._forget()
                self._rotate()
        if self._fd < 0:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Not blocking: somebody's FIFO of that name must not hold the thread for ever.
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0)
            self._fd = os.open(self._path, flags, 0o600)
            found = os.fstat(self._fd)
            if not stat.S_ISREG(found.st_mode):
                self._forget()
                raise OSError(22, "it is not a regular file")
            if found.st_size and found.st_size + needed > self._max_bytes:
                self._forget()
                self._rotate()
                return self._ready(needed)
        return os.fstat(self._fd).st_size

    def _append(self, data: bytes, size: int) -> None:
        done = 0
        try:
            while done < len(data):
                done += os.write(self._fd, data[done:])
        except OSError:
            # A torn line would be glued to the next one. Truncating needs no space.
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, size)
            raise

    def _rotate(self) -> None:
        if not self._keep:
            self._path.unlink(missing_ok=True)
            return
        for number in range(self._keep - 1, 0, -1):
            with contextlib.suppress(FileNotFoundError):
                os.replace(self._numbered(number), self._numbered(number + 1))
        with contextlib.suppress(FileNotFoundError):
            os.replace(self._path, self._numbered(1))

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")

    def _forget(self) -> None:
        fd, self._fd = self._fd, -1
        with contextlib.suppress(OSError):
            os.close(fd)

    # ---- telling about it, once a spell

    def _trouble(self, error: OSError) -> None:
        if self._fd >= 0:
            self._forget()
        if not self._failing:
            self._failing = True
            why = error.strerror or str(error)
            log.warning("[log] file %s: cannot be written: %s; its lines wait in memory", self._path, why)

    def _works(self) -> None:
        self._failing = False
        if self.dropped > self._told:
            lost, self._told = self.dropped - self._told, self.dropped
            told = "1 line was lost" if lost == 1 else f"{lost} lines were lost"
            log.warning("[log] file %s: %s", self._path, told)
