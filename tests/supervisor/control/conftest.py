"""Shared by the tests of the control socket: a snapshot that tests shape, and who is asked to act."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from supervisor.control.server import open_control
from supervisor.control.snapshot import Snapshot
from supervisor.control.surface import Surface
from supervisor.control.why import explained


class Acts:
    """Notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[object, ...]] = []
        self.held = True

    def pause(self, reason: str, *, for_s: float | None, free_vram: bool) -> None:
        self.asked.append(("pause", reason, for_s, free_vram))

    def resume(self) -> bool:
        self.asked.append(("resume",))
        held, self.held = self.held, False
        return held

    def drain(self, reason: str, *, restart: bool) -> None:
        self.asked.append(("drain", reason, restart))


class Box:
    """A served control socket."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.acts = Acts()
        self.shown = Snapshot(version="1.2", worker="box", pid=7)
        self.surface = Surface(lambda: explained(self.shown), self.acts, lambda: ["bulkhead_gpu_x 1"])


@pytest.fixture
async def box(tmp_path) -> AsyncIterator[Box]:
    made = Box(tmp_path / "control.sock")
    async with open_control(made.path, made.surface):
        yield made
