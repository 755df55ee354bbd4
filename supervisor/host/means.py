"""By which means the host reaches the outside; tests under a virtual clock replace them."""

from __future__ import annotations

import random
import shutil
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, NamedTuple

import trio

from supervisor.host.child import open_child
from supervisor.host.work import ModelSpec

OpenChild = Callable[..., AbstractAsyncContextManager[Any]]


async def trust(_spec: ModelSpec) -> str:
    """Verify nothing."""
    return ""


async def remove_tree(folder: Path) -> None:
    """Remove a folder and all in it, in a thread: an engine may have left gigabytes."""
    await trio.to_thread.run_sync(lambda: shutil.rmtree(folder, ignore_errors=True))


class Means(NamedTuple):
    """What to call.

    Attributes:
        verify: checks a model's files before anything is started; returns its revision, raises FaultError.
        spawn: `open_child`, or `FakeEngines`.
        remove: removes a scratch folder.
        jitter: a number in [0, 1).
    """

    verify: Callable[[ModelSpec], Awaitable[str]] = trust
    spawn: OpenChild = open_child
    remove: Callable[[Path], Awaitable[None]] = remove_tree
    jitter: Callable[[], float] = random.random


REAL_MEANS = Means()
