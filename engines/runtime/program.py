"""A program that an engine runs, on a leash: see lockdown/leash.py for what the leash promises."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from engines.launch import ENVIRONMENT

MAX_LINE_BYTES = 8192
_READ_BYTES = 2**16
_LEASH = str(Path(__file__).parents[1] / "lockdown" / "leash.py")


def inherited() -> dict[str, str]:
    """What a program of the operator's gets of our environment: not the settings meant for engine libraries.

    HF_HUB_OFFLINE, say, keeps an engine from fetching models by itself; a server of the operator's has to.
    """
    ours = {name for name, value in ENVIRONMENT.items() if os.environ.get(name) == value}
    # Lines of a Python program shall come when they are printed, not when its buffer is full.
    return {name: value for name, value in os.environ.items() if name not in ours} | {"PYTHONUNBUFFERED": "1"}


class Program:
    """One running program; its stdout and stderr come as one stream of lines.

    Threads: `lines` and `wait` belong to one thread; `terminate` and `kill` may come from any and do not block.
    """

    def __init__(self, argv: Sequence[str], *, env: Mapping[str, str], cwd: Path, grace_s: float) -> None:
        """Start it.

        Args:
            env: the whole environment.
            grace_s: between SIGTERM and SIGKILL after `terminate`.

        Raises:
            OSError: not even the leash could be started.
        """
        lifeline, self._lifeline = os.pipe()
        os.set_blocking(self._lifeline, False)
        self._lock = threading.Lock()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", _LEASH, str(lifeline), str(grace_s), *argv],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=dict(env),
                cwd=cwd,
                pass_fds=(lifeline,),
                start_new_session=True,
                bufsize=0,
            )
        except BaseException:
            self.kill()
            raise
        finally:
            os.close(lifeline)

    def lines(self) -> Iterator[str]:
        """Yield output line by line until the whole family of the program is gone.

        A carriage return ends a line too (progress bars). Longer lines are cut at `MAX_LINE_BYTES`, bytes that
        are not UTF-8 are replaced.
        """
        assert self._process.stdout is not None
        fd, rest, cutting = self._process.stdout.fileno(), b"", False
        while data := os.read(fd, _READ_BYTES):
            *whole, rest = (rest + data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")).split(b"\n")
            for line in whole:
                if not cutting:
                    yield _text(line)
                cutting = False
            if len(rest) > MAX_LINE_BYTES:
                if not cutting:
                    yield _text(rest)
                rest, cutting = b"", True
        if rest and not cutting:
            yield _text(rest)

    def terminate(self) -> None:
        """Ask it to end: SIGTERM, the grace period, SIGKILL."""
        with self._lock, contextlib.suppress(OSError):
            if self._lifeline >= 0:
                os.write(self._lifeline, b"T")

    def kill(self) -> None:
        """End it and its family at once."""
        with self._lock:
            if self._lifeline >= 0:
                os.close(self._lifeline)
                self._lifeline = -1

    def wait(self) -> int:
        """Reap it: the exit code, or minus the number of the signal that ended it."""
        code = self._process.wait()
        self.kill()
        if self._process.stdout is not None:
            self._process.stdout.close()
        return code


def describe(code: int) -> str:
    """ "ended with exit code 3" or "was killed by SIGSEGV"."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def _text(line: bytes) -> str:
    cut = line[:MAX_LINE_BYTES].decode(errors="replace")
    return cut + "…" if len(line) > MAX_LINE_BYTES else cut
