"""Shared by the tests of the verbs: a configuration whose supervisor is the served box, and somebody who types."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable

import pytest
import trio

from supervisor.cli import main


@pytest.fixture
async def config(tmp_path, box) -> str:
    """A worker.toml whose supervisor is the served box."""
    path = tmp_path / "worker.toml"
    path.write_text('config_version = 1\n[control]\nsocket = "control.sock"\n')
    return str(path)


@pytest.fixture
def types(config) -> Callable[..., Awaitable[int]]:
    """Types a command for that configuration; returns its exit code."""

    async def typed(*words: str) -> int:
        return await trio.to_thread.run_sync(functools.partial(main, [*words, "--config", config]))

    return typed
