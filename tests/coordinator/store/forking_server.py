"""A program that has everything imported and forks a coordinator per line: a state folder in, `pid N` out.

A start costs a fork instead of a second of imports, so a test can afford many. What runs in the child is the whole
`coordinator serve` with its line on stdout. Who starts it gives it a session of its own, and ends that as a whole.
"""

from __future__ import annotations

import os
import signal
import sys

import coordinator.app  # noqa: F401 - `serve` imports it when it is run, and then it is here
from coordinator.cli.main import main


def forked(state: str) -> int:
    """The process id of a coordinator over the folder."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        code = main(["serve", "--listen", "127.0.0.1:0", "--state", state])
    finally:
        os._exit(code)


def serve() -> None:
    """Until stdin ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries them
    for line in sys.stdin:
        child = forked(line.strip())
        sys.stdout.write(f"pid {child}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
