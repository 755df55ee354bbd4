"""Our studio side, held against the suite that every studio server has to pass."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import trio
from msgspec import structs

from coordinator.keys import FILE_NAME
from coordinator.registrations import Registrations
from coordinator.studio.claims import Source, SourceFile
from coordinator.testing import Running, running
from coordinator.testing_link import submission
from tests.coordinator.studio_rig import FAST
from tests.supervisor.link.dialects.studio_conformance import BROUGHT, JobSeen, StudioServerCases

_STATES = {"queued": "queued", "running": "claimed", "succeeded": "done", "failed": "failed"}


class Owner:
    """What the owner of our coordinator can do, as the suite asks for it."""

    def __init__(self, there: Running, folder: Path, dead_s: float | None) -> None:
        self.url, self.dead_s, self._there = there.url, dead_s, there
        self._file = folder / FILE_NAME
        key = there.coordinator.keys.create("admin")
        self._admin = httpx.Client(base_url=there.url, headers={"authorization": f"Bearer {key}"}, timeout=60)
        self._numbers = itertools.count(1)
        self._requests: dict[str, str] = {}

    async def admit(self) -> tuple[str, str]:
        """As `coordinator registrations approve` does it, beside the running server."""
        install = f"install-{next(self._numbers)}"
        registrations = Registrations(self._file)
        known = {"machine": "box", "user": "somebody", "models": []}
        request, _ = registrations.request(install, "192.0.2.1", hashlib.sha256(b"secret").digest(), "x", known)
        registrations.approve(request)
        polled = registrations.poll(request, "secret")
        registrations.close()
        assert polled is not None
        self._requests[polled.worker] = request
        return polled.worker, polled.token

    async def delete(self, worker: str) -> None:
        await self.reject(self._requests[worker], "deleted")

    async def approve(self, request: str) -> None:
        await self._post(f"/v1/registrations/{request}/approve", {})

    async def reject(self, request: str, reason: str) -> None:
        await self._post(f"/v1/registrations/{request}/reject", {"reason": reason})

    async def enqueue(self, task: dict[str, Any], model: str, vram_gb: float = 0.0) -> str:
        params = {{"ext": "format"}.get(name, name): value for name, value in task.items() if name != "kind"}
        job = submission(
            kind=task["kind"],
            model=model,
            params=msgspec.msgpack.encode(params),
            vram_gb_estimate=vram_gb,
            wait_for_worker=True,
        )
        submit = self._there.coordinator.parts.dispatcher.submit
        record = await trio.to_thread.run_sync(lambda: self._there.call(submit, job))
        return record.id

    async def job(self, job: str) -> JobSeen:
        seen = await self._get(f"/v1/jobs/{job}")
        state, result, file = _STATES[seen["state"]], None, None
        if state == "done" and seen["kind"] == "llm":
            said = await self._get(f"/v1/jobs/{job}/result")
            result = {"choices": [{"message": {"content": said["content"]}}]}
        elif state == "done":
            file = (await self._fetch(seen["files"][0]["url"])).content
        return JobSeen(state=state, result=result, file=file, error=(seen["fault"] or {}).get("message", ""))

    async def _post(self, path: str, body: dict[str, Any]) -> None:
        answer = await trio.to_thread.run_sync(lambda: self._admin.post(path, json=body))
        assert answer.is_success, answer.text

    async def _get(self, path: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((await self._fetch(path)).content)
        return found

    async def _fetch(self, path: str) -> httpx.Response:
        return await trio.to_thread.run_sync(lambda: self._admin.get(path))

    def close(self) -> None:
        self._admin.close()


class TestOurStudio(StudioServerCases):
    @pytest.fixture
    def studio(self, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Owner]:
        """Made outside of trio: the coordinator runs on another loop."""
        # Silence ends a session early where that is the case's matter; elsewhere a loaded machine may be slow.
        silent = "silent" in request.node.name
        silence_s = 5.0 if silent else FAST.silence_s
        file = SourceFile(role="model", url="https://models.example/m.gguf", filename="m.gguf")
        brought = {BROUGHT: Source(engine="llama-cpp", files=[file])}
        settings = structs.replace(FAST, silence_s=silence_s, busy_s=0.2)
        with running(tmp_path, studio=settings, studio_models=brought) as there:
            owner = Owner(there, tmp_path, silence_s if silent else None)
            yield owner
            owner.close()
