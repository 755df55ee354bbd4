"""A coordinator with fast times, its client and its admin, for the tests of studio workers."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import msgspec

from coordinator.studio.session import StudioSettings
from coordinator.testing import Running
from coordinator.testing_link import submission
from coordinator.testing_studio import PATIENCE_S, Admitted

# What a slow machine could miss is as long as it likes; the tests of what is too late have times of their own.
FAST = StudioSettings(
    hello_s=60.0, silence_s=60.0, sweep_s=0.1, busy_s=0.4, let_go_s=60.0, upload_idle_s=60.0, asked=1000
)
ANSWER = {
    "object": "chat.completion",
    "model": "a-llm",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello you"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    "elapsed_ms": 12,
}
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


class House:
    """A coordinator, its client and its admin; the models of each test have names of their own."""

    def __init__(self, there: Running, pool: ThreadPoolExecutor) -> None:
        self.there, self.url, self._pool = there, there.url, pool
        self.tag = f"t{next(_numbers)}"
        self.admin_key = there.coordinator.keys.create("admin", name="boss")
        self.client = httpx.Client(base_url=there.url, headers=there.headers, timeout=PATIENCE_S)
        self.admin = httpx.Client(
            base_url=there.url, headers={"authorization": f"Bearer {self.admin_key}"}, timeout=PATIENCE_S
        )

    def worker(self, **said: Any) -> Admitted:
        """A worker that was let in."""
        return Admitted(self.url, self.admin_key, tag=self.tag, **said)

    def submit(self, kind: str = "llm", params: Any = None, **more: Any) -> str:
        """A job that waits for whoever comes."""
        job = submission(
            kind=kind,
            model=f"{self.tag}-{kind}",
            params=msgspec.msgpack.encode(params or CHAT),
            wait_for_worker=True,
            **more,
        )
        return self.there.call(self.there.coordinator.parts.dispatcher.submit, job).id

    def job(self, job: str) -> dict[str, Any]:
        """As a client sees it."""
        found: dict[str, Any] = self.client.get(f"/v1/jobs/{job}").json()
        return found

    def result(self, job: str) -> dict[str, Any]:
        """What came of it."""
        found: dict[str, Any] = self.client.get(f"/v1/jobs/{job}/result").raise_for_status().json()
        return found

    def ended(self, job: str) -> dict[str, Any]:
        """Wait for its end."""
        found: dict[str, Any] = until(lambda: (seen := self.job(job))["state"] not in ("queued", "running") and seen)
        return found

    def ask(self, path: str, **request: Any) -> Future[httpx.Response]:
        """A request that waits for its job."""
        return self._pool.submit(lambda: self.client.post(path, **request))

    def chat(self, **more: Any) -> Future[httpx.Response]:
        """An OpenAI client's chat."""
        return self.ask("/v1/chat/completions", json={"model": f"{self.tag}-llm", **CHAT, **more})

    def seen(self, worker: Admitted) -> dict[str, Any] | None:
        """What the list of workers says of one."""
        data = self.admin.get("/v1/workers").json()["data"]
        return next((one for one in data if one["id"] == worker.id), None)


_numbers = itertools.count(1)


def until(true: Callable[[], Any]) -> Any:
    """Wait for what has no event of its own."""
    end = time.monotonic() + PATIENCE_S
    while not (value := true()):
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.02)
    return value


@contextlib.contextmanager
def opened(there: Running) -> Iterator[House]:
    with ThreadPoolExecutor(8) as pool:
        house = House(there, pool)
        with house.client, house.admin:
            yield house
