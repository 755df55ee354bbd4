"""Ctrl-C in commands that end with one sentence."""

from __future__ import annotations

INTERRUPTED = 130  # exit code, as shells say it: 128 + SIGINT


def is_interrupt(error: BaseException) -> bool:
    """Whether this is a Ctrl-C, which a nursery wraps in a group."""
    if isinstance(error, BaseExceptionGroup):
        return error.subgroup(KeyboardInterrupt) is not None
    return isinstance(error, KeyboardInterrupt)
