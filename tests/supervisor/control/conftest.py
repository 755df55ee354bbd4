"""Shared by the tests of the control socket: a snapshot that tests shape, and who is asked to act."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from supervisor.control import asked
from supervisor.control.server import open_control
from supervisor.control.snapshot import Snapshot
from supervisor.control.surface import Surface
from supervisor.control.why import explained
from supervisor.intake.holds import Hold, Source


class Acts:
    """Notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[object, ...]] = []
        self.held = True

    def pause(self, reason: str, *, for_s: float | None, free_vram: bool, kind: str = "", gpu: str = "") -> None:
        scope = (kind, gpu) if kind or gpu else ()
        self.asked.append(("pause", reason, for_s, free_vram, *scope))

    def resume(self, *, kind: str = "", gpu: str = "") -> bool:
        self.asked.append(("resume", *((kind, gpu) if kind or gpu else ())))
        held, self.held = self.held, False
        return held

    def put_hold(self, order: asked.PutHold) -> Hold:
        self.asked.append(("put_hold", order))
        return Hold(source=order.source, since=1.0)

    def lift_hold(self, source: str, *, kind: str = "", gpu: str = "") -> bool:
        self.asked.append(("lift_hold", source, kind, gpu))
        return True

    def cordon(self, gpu: str, order: asked.Cordon) -> Hold:
        self.asked.append(("cordon", gpu, order))
        return Hold(source=Source.OPERATOR, since=1.0, gpu=gpu)

    def uncordon(self, gpu: str) -> bool:
        self.asked.append(("uncordon", gpu))
        return True

    def drain(self, reason: str, *, restart: bool) -> None:
        self.asked.append(("drain", reason, restart))

    def shutdown(self, reason: str) -> None:
        self.asked.append(("shutdown", reason))

    async def reload(self) -> Mapping[str, Any]:
        self.asked.append(("reload",))
        return {"ok": True, "applied": []}

    async def register(self, order: asked.Register) -> Mapping[str, Any]:
        self.asked.append(("register", order))
        return {"url": order.url}

    def log_level(self, level: str, for_s: float | None) -> None:
        self.asked.append(("log_level", level, for_s))

    def load(self, model: str) -> str:
        self.asked.append(("load", model))
        return "It is being loaded."

    def unload(self, model: str, reason: str) -> str:
        self.asked.append(("unload", model, reason))
        return "It ends now."

    def restart(self, model: str, reason: str, *, now: bool) -> str:
        self.asked.append(("restart", model, reason, now))
        return "It is loaded anew now."

    async def _events(self) -> AsyncIterator[Mapping[str, Any] | None]:
        yield {"t": "plan", "files": ["a"], "total_bytes": 3}
        yield None
        yield {"t": "done", "name": "a"}

    def pull(self, order: asked.Pull) -> AsyncIterator[Mapping[str, Any] | None]:
        self.asked.append(("pull", order))
        return self._events()

    async def remove(self, order: asked.Remove) -> str:
        self.asked.append(("remove", order))
        return "It is gone."

    def cancel_job(self, job: str, reason: str) -> int:
        self.asked.append(("cancel_job", job, reason))
        return 1


class Box:
    """A served control socket."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.acts = Acts()
        self.shown = Snapshot(version="1.2", worker="box", pid=7)
        self.surface = Surface(
            lambda: explained(self.shown),
            self.acts,
            lambda: ["bulkhead_gpu_x 1"],
            diagnostics=self._diagnostics,
            doctor=self._doctor,
        )

    async def _diagnostics(self) -> bytes:
        return b"a bundle"

    async def _doctor(self) -> Mapping[str, Any]:
        return {"ok": True, "checks": []}


@pytest.fixture
async def box(tmp_path) -> AsyncIterator[Box]:
    made = Box(tmp_path / "control.sock")
    async with open_control(made.path, made.surface):
        yield made
