"""Endings of commands: a refusal and a Ctrl-C are one sentence and an exit code, never a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable

from supervisor.errors import SupervisorError

INTERRUPTED = 130  # exit code, as shells say it: 128 + SIGINT


def is_interrupt(error: BaseException) -> bool:
    """Whether this is a Ctrl-C, which a nursery wraps in a group, and Python 3.11 in an error while a class is made."""
    if isinstance(error, BaseExceptionGroup):
        return error.subgroup(KeyboardInterrupt) is not None
    if isinstance(error, RuntimeError):
        return isinstance(error.__cause__, KeyboardInterrupt)
    return isinstance(error, KeyboardInterrupt)


def ended(command: Callable[[], int], stopped: str) -> int:
    """Run a command to its end; returns its exit code.

    Args:
        stopped: what a Ctrl-C means for the work so far, for stderr.

    Raises:
        Exception: what is neither a SupervisorError nor a Ctrl-C is a mistake of ours and keeps its traceback.
    """
    try:
        return command()
    except SupervisorError as error:
        sys.stderr.write(f"{error}\n")
        return int(error.exit_code)
    except BaseException as error:
        if not is_interrupt(error):
            raise
        sys.stderr.write(f"\n{stopped}\n")
        return INTERRUPTED
