"""What the real and the simulated reader have in common: a line out, questions in, and a leash.

Out: one JSON object per line on descriptor 1, each with "t":

    {"t": "reading", "asked": 7, "driver": "580.95.05", "cuda": "13.0", "events": "", "gpus": [{…}]}
    {"t": "event", "kind": "xid", "uuid": "GPU-…", "xid": 79}
    {"t": "none", "error": "NVMLError_LibraryNotFound: NVML Shared Library Not Found"}

`none` is said once and is the last line: there is no GPU. The fields of a GPU are those of
`supervisor.machine.readings.GpuReading`; every one is optional, and what NVML refused is in `missing` by field.

In: "read 7" asks for a reading now instead of at the next second; the answer, and every later one, has an `asked` of
at least 7 and was begun after the question. The end of the input ends the reader: only our parent holds the other
end, so a supervisor that dies leaves no reader behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
from typing import Any

_PR_SET_PDEATHSIG = 1
MIN_GAP_S = 0.05  # between readings, however often one is asked for


class Line:
    """The line out. Whole lines only, from whichever thread.

    Args:
        fd: owned from now on; see `take_line`.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        """Write one line; nobody reading any more ends the process."""
        self.send_raw((json.dumps(message) + "\n").encode())

    def send_raw(self, data: bytes) -> None:
        """Write bytes as they are."""
        try:
            with self._lock:
                while data:
                    data = data[os.write(self._fd, data) :]
        except BrokenPipeError:
            os._exit(0)


def take_line() -> Line:
    """Claim descriptor 1 before a driver library can print on it; afterwards fd 1 is stderr."""
    fd = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return Line(fd)


def die_with_parent() -> None:
    """Be killed when the thread that started us ends (Linux). Ours is the supervisor's main thread."""
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


class Questions:
    """What is read from descriptor 0, on a thread of its own; the end of the input ends the process.

    NVML releases the interpreter while it works, so this thread runs also when a driver hangs.
    """

    def __init__(self) -> None:
        self._bell = threading.Condition()
        self._asked = 0

    def listen(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._listen, name="questions", daemon=True).start()

    def wait(self, answered: int, patience_s: float) -> int:
        """Wait until somebody asks for more than `answered`, or `patience_s` have passed; returns the latest."""
        with self._bell:
            self._bell.wait_for(lambda: self._asked > answered, patience_s)
            return self._asked

    def _listen(self) -> None:
        rest = b""
        while data := os.read(0, 4096):
            *lines, rest = (rest[-4096:] + data).split(b"\n")
            for line in lines:
                word, _, number = line.partition(b" ")
                if word == b"read" and number.isdigit() and len(number) <= 18:
                    self._ask(int(number))
        os._exit(0)

    def _ask(self, number: int) -> None:
        with self._bell:
            self._asked = max(self._asked, number)
            self._bell.notify_all()
