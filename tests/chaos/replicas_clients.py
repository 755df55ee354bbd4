"""Simulated clients of many replicas: streams, jobs that are asked for again, cancels, and clients that just leave.

Who has an idempotency key comes back with it, to whichever replica answers, until it knows how its job ended. Who has
none and stays must get its answer from the replica that it asked, unless something happened to that very replica, or
its worker was lost with another one. Who stays through an outage may lose its worker only with a replica that ended, or
on a machine that was too busy.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpx

from tests.chaos.replicas_crowd import MODEL, Ledger, answer
from tests.chaos.replicas_rig import Cluster, Replica

CLIENT_S = 600.0  # a job that has not ended by then is lost; with twenty others on two cores one took over 120
STEP_S = 15.0  # a replica that is stopped takes a connection and says nothing: not longer than this
AGAIN_S = 0.2
OUTAGE_S = 8.0  # longer than replicas wait for each other's beats
STANDING_S = 5.0  # what a healthy replica needs at most after an outage
# Shares of the asks: jobs, clients that leave, and that stay without a key; of the jobs, those that are cancelled.
JOBS, LEAVERS, STAYERS, CANCELS = 0.2, 0.1, 0.25, 0.4
REFUSALS = frozenset({"overloaded", "no_worker"})  # before there is a job; the client may ask again
ENDS = frozenset({"succeeded", "failed", "cancelled"})

Step = Callable[[str], Awaitable[bool]]


class SimClient:
    """Asks for one thing after the other, until told to stop."""

    def __init__(self, name: str, cluster: Cluster, ledger: Ledger, dice: random.Random, tokens: int) -> None:
        self._name, self._cluster, self._ledger, self._dice, self._tokens = name, cluster, ledger, dice, tokens

    async def run(self, more: Callable[[], bool]) -> None:
        """Ask while there shall be more."""
        number = 0
        async with httpx.AsyncClient(timeout=httpx.Timeout(CLIENT_S, connect=3.0), trust_env=False) as http:
            while more():
                number += 1
                key, count, way = f"{self._name}-{number}", self._dice.randint(1, self._tokens), self._dice.random()
                try:
                    async with asyncio.timeout(CLIENT_S):
                        if way < LEAVERS:
                            await self._leave(http, count)
                        elif way < LEAVERS + JOBS:
                            await self._job(http, key, count)
                        elif way < LEAVERS + JOBS + STAYERS:
                            await self._stay(key, count)
                        else:
                            await self._stream(http, key, count)
                except TimeoutError:
                    self._ledger.wrong.append(f"{key}: no answer within {CLIENT_S:g} s")

    async def _insist(self, step: Step) -> int:
        """Take a step at any replica until it has gone well; how often it was tried."""
        tries = 0
        while True:
            tries += 1
            with contextlib.suppress(httpx.HTTPError, OSError, TimeoutError):
                async with asyncio.timeout(STEP_S):
                    if await step(self._dice.choice(self._cluster.urls or ["http://127.0.0.1:9"])):
                        return tries
            await asyncio.sleep(AGAIN_S)

    def _headers(self, key: str = "") -> dict[str, str]:
        return {"authorization": f"Bearer {self._cluster.client_key}"} | ({"idempotency-key": key} if key else {})

    def _code(self, what: str, body: bytes) -> str:
        """The code of a refusal, which is JSON whatever has happened."""
        code = _code(body)
        if not code.isidentifier():
            self._ledger.wrong.append(f"{what}: {code}")
            return ""
        self._ledger.faults[code] += 1
        return code

    # ---- streams -------------------------------------------------------------------------------------------

    async def _stream(self, http: httpx.AsyncClient, key: str, count: int) -> None:
        """A stream; when it breaks, the answer by the same key."""
        self._ledger.submitted.add(key)
        tries = await self._insist(lambda url: self._follow(http, url, key, count))
        self._ledger.whole += tries == 1
        self._ledger.resumed += tries > 1

    async def _leave(self, http: httpx.AsyncClient, count: int) -> None:
        """A stream without a key, whose client is gone before its end, more often than not."""
        url = self._dice.choice(self._cluster.urls or ["http://127.0.0.1:9"])
        with contextlib.suppress(httpx.HTTPError, OSError, TimeoutError):
            async with asyncio.timeout(self._dice.uniform(0.05, 1.0)):
                await self._follow(http, url, "", count)

    async def _follow(self, http: httpx.AsyncClient, url: str, key: str, count: int) -> bool:
        """Follow a stream; whether the job has ended. What came must be the answer from its beginning, whole or not."""
        text, job, fault, done = "", "", "", False
        body = {"model": MODEL, "messages": [{"role": "user", "content": str(count)}], "stream": True}
        path = f"{url}/v1/chat/completions"
        async with http.stream("POST", path, headers=self._headers(key), json=body) as response:
            job = response.headers.get("x-bulkhead-job", "")
            if response.status_code != 200:
                return self._failed(key, job, self._code(key, await response.aread()))
            if not key:
                self._ledger.left.add(job)
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    done = True
                elif line.startswith("data: "):
                    event = json.loads(line[6:])
                    fault = event.get("error", {}).get("code", "") or fault
                    for choice in event.get("choices", ()):
                        text += choice["delta"].get("content") or ""
                    if not answer(count).startswith(text):
                        self._ledger.wrong.append(f"{key} {job}: tokens are not contiguous: {text[-60:]!r}")
        if fault:
            self._ledger.faults[fault] += 1
            return self._failed(key, job, fault)
        if done and text != answer(count):
            self._ledger.wrong.append(f"{key} {job}: {len(text)} of {len(answer(count))} characters, and an end")
        if done and key:
            self._ledger.answers[key] = (job, "succeeded")
        return done

    def _failed(self, key: str, job: str, code: str) -> bool:
        """Whether this fault is the job's own; others are the replica's, and another try may go better."""
        if code == "worker_lost" and key:
            self._ledger.answers[key] = (job, "failed")
        return code == "worker_lost"

    # ---- who stays without a key ---------------------------------------------------------------------------

    async def _stay(self, name: str, count: int) -> None:
        """An answer that is asked for once, as a stream or whole; who asks waits until its end, whatever happens."""
        serving = [one for one in self._cluster.replicas if one.url and not one.ends % 2]
        if serving:
            await self._stay_at(self._dice.choice(serving), name, count, streamed=self._dice.random() < 0.5)
        else:
            await asyncio.sleep(AGAIN_S)

    async def stay_at(self, replica: Replica, name: str, count: int, begun: asyncio.Event) -> None:
        """A stream at one replica, which takes it sooner or later; `begun` is set with its first token."""
        while not await self._stay_at(replica, name, count, streamed=True, begun=begun):  # noqa: ASYNC110 - no event
            await asyncio.sleep(AGAIN_S)
        begun.set()

    async def _stay_at(
        self, replica: Replica, name: str, count: int, *, streamed: bool, begun: asyncio.Event | None = None
    ) -> bool:
        """Whether there was an answer or should have been one; False: it was refused before there was a job."""
        life, outage = (replica.ends, replica.stops), begun is not None
        before = _silences(self._cluster.replicas if outage else [replica])
        try:
            job, code = await self._answered(f"{replica.url}/v1/chat/completions", count, streamed, begun)
        except (httpx.HTTPError, OSError) as error:
            job, code = "", type(error).__name__
        if not code:
            self._ledger.stayed[job] = count
        elif (replica.ends, replica.stops) != life:
            self._ledger.faults[f"its replica's end: {code}"] += 1
        elif job and code == "worker_lost" and (not outage or await self._lost_with_another(job, before)):
            self._ledger.faults[code] += 1  # `judge` bounds how many these are
        elif not job and code in REFUSALS:
            self._ledger.faults[code] += 1
            return False
        elif code == "cancelled" and await self._stood_still(
            {replica: before[replica]}, OUTAGE_S + STANDING_S if outage else 0.0
        ):
            self._ledger.faults["its replica stood still: cancelled"] += 1
        else:
            self._ledger.wrong.append(f"{name} {job}: its replica lived, and the answer ended with {code}")
        return True

    async def _lost_with_another(self, job: str, before: dict[Replica, int]) -> bool:
        """Whether a replica ended that its worker was at, or one of them all stood still in an outage."""
        if self._ledger.seats[job] - set(self._cluster.urls):
            return True
        return await self._stood_still(before, OUTAGE_S + STANDING_S)

    async def _stood_still(self, before: dict[Replica, int], longest_s: float) -> bool:
        """Whether a machine that is too busy kept one of them from saying that it lives, for longer than what was done
        to it."""
        end = time.monotonic() + STEP_S  # it is told by its log alone
        while not any(longest > longest_s for one, seen in before.items() for longest in one.silences()[seen:]):
            if time.monotonic() > end:
                return False
            await asyncio.sleep(AGAIN_S)
        return True

    async def _answered(
        self, url: str, count: int, streamed: bool, begun: asyncio.Event | None = None
    ) -> tuple[str, str]:
        """(job, "" or the code of what went wrong). Raises httpx.HTTPError when the connection breaks.

        On a connection of its own: a kept one is closed for its idleness by a replica that was stopped meanwhile.
        """
        body = {"model": MODEL, "messages": [{"role": "user", "content": str(count)}], "stream": streamed}
        async with (
            httpx.AsyncClient(timeout=CLIENT_S, trust_env=False) as http,
            http.stream("POST", url, headers=self._headers(), json=body) as response,
        ):
            job = response.headers.get("x-bulkhead-job", "")
            if response.status_code != 200:
                return job, _code(await response.aread())
            if not streamed:
                whole = json.loads(await response.aread())
                text = whole["choices"][0]["message"]["content"]
                return (job, "") if text == answer(count) else (job, f"another answer: {text[-60:]!r}")
            text, fault, done = "", "", False
            async for line in response.aiter_lines():
                done = done or line == "data: [DONE]"
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    fault = event.get("error", {}).get("code", "") or fault
                    text += "".join(choice["delta"].get("content") or "" for choice in event.get("choices", ()))
                if text and begun is not None:
                    begun.set()
        if fault or (done and text == answer(count)):
            return job, fault
        return job, f"{len(text)} of {len(answer(count))} characters{', and an end' * done}"

    # ---- jobs ----------------------------------------------------------------------------------------------

    async def _job(self, http: httpx.AsyncClient, key: str, count: int) -> None:
        """A job that was submitted as one; it is looked for until its end, or cancelled after a moment."""
        self._ledger.submitted.add(key)
        params: Any = {"messages": [{"role": "user", "content": str(count)}]}
        body = {"kind": "llm", "model": MODEL, "params": params, "wait_for_worker": True}
        if self._dice.random() < 0.5:
            body["wait"] = 2
        job = ""

        async def submit(url: str) -> bool:
            nonlocal job
            response = await http.post(f"{url}/v1/jobs", headers=self._headers(key), json=body)
            if response.status_code not in (200, 202):
                self._code(key, response.content)
                return False
            job = response.json()["id"]
            return True

        await self._insist(submit)
        if self._dice.random() < CANCELS:
            self._ledger.cancelling.add(key)
            await asyncio.sleep(self._dice.uniform(0.0, 0.5))
            await self._insist(lambda url: self._look(http, "POST", f"{url}/v1/jobs/{job}/cancel", key, job))
        else:
            await self._insist(lambda url: self._look(http, "GET", f"{url}/v1/jobs/{job}", key, job))
        if self._ledger.answers[key] == (job, "succeeded"):
            await self._insist(lambda url: self._result(http, f"{url}/v1/jobs/{job}/result", key, count))

    async def _look(self, http: httpx.AsyncClient, method: str, url: str, key: str, job: str) -> bool:
        """Whether the job has ended; how, is noted."""
        response = await http.request(method, url, headers=self._headers())
        if response.status_code != 200:
            if self._code(key, response.content) == "not_found":
                self._ledger.wrong.append(f"{key} {job}: its id was told, and it is not there")
            return False
        state = response.json()["state"]
        if method == "POST" and state not in ENDS:
            self._ledger.wrong.append(f"{key} {job}: cancelled, and {state}")
        if state in ENDS:
            self._ledger.answers[key] = (job, state)
        return state in ENDS

    async def _result(self, http: httpx.AsyncClient, url: str, key: str, count: int) -> bool:
        response = await http.get(url, headers=self._headers())
        if response.status_code != 200:
            self._code(key, response.content)
            return False
        if (text := response.json()["content"]) != answer(count):
            self._ledger.wrong.append(f"{key}: another result than was made: {text[-60:]!r}")
        return True


def _silences(replicas: Sequence[Replica]) -> dict[Replica, int]:
    """How often each was silent for too long up to now."""
    return {one: len(one.silences()) for one in replicas}


def _code(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["code"])
    except (ValueError, LookupError, TypeError):
        return f"a refusal that cannot be read: {body[:200]!r}"
