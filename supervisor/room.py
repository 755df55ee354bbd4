"""Room in GPU memory: who may load, who has to go, and whether the memory came back.

Theory of operation. Every instance lives inside one `place` block: entered before its process is started, left
after the process has ended. Entering queues: first come, first served among those that want the same GPU. Whoever
is first is judged by `intake.residency`; the verdict is carried out by asking lanes to end themselves (`evict`),
and then by looking again: what counts is the memory that the driver measures, never what should have come back.
Somebody who waits for memory that only other programs could free holds up nobody behind it, and neither does a
load that nobody asks for any more (a preload): it ends nobody's instance, and waits for free room.

A load has a promise (a reservation) for what it is going to take, less what it is seen to hold already, so that
two loads at once are not both told that there is room. The promise ends when the model has been idle for a moment;
what it held by then, and ever after, is learned for the next time.

A model that is never idle keeps nobody out for ever: after `PATIENCE_S` it is asked to end between two jobs.

All methods belong to the trio thread. GPU telemetry comes from a child; without it everybody fits.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path

import trio

from protocol.faults import refuse
from supervisor.claims import Claim, Gpus
from supervisor.host.family import members
from supervisor.host.means import Occupant
from supervisor.host.work import ModelSpec, Progress
from supervisor.intake import residency
from supervisor.intake.residency import Evict, Fits, Never, Wait, gib, short
from supervisor.machine.readings import GpuReading, devices
from supervisor.peaks import Facts, Peaks, facts_of

log = logging.getLogger(__name__)

# How often the situation is looked at while somebody waits: lanes tell nobody when they become idle.
LOOK_S = 0.25
# A model that works without a break is asked to end between two jobs when another has waited this long for it.
PATIENCE_S = 20.0
# After the end of a process its memory is back within 2 s on every driver seen; twice that on a loaded box.
BACK_S = 10.0
# What may be missing from it all the same: the driver's own bookkeeping.
SLACK_BYTES = 64 * 2**20
# Sign of life for those who wait, though nothing changed.
TELL_AGAIN_S = 10.0
# Readings come once a second: what a model holds is known this long after it became idle.
SETTLE_S = 2.0
# How long a load waits for the first reading: at boot the driver may need seconds, a hung one never answers.
KNOWN_S = 10.0
# How often the memory of loaded models is looked at, to learn their peaks.
LEARN_S = 2.0


class VramRoom:
    """See the module.

    Args:
        gpus: the telemetry.
        margin_bytes: what stays free on each GPU.
        peaks: what was learned earlier; kept on disk.
        unusable: why nothing may load on this GPU ("" when it may): a fault, a process that cannot leave it.
        on_lost: told a GPU and a sentence when memory did not come back.
        facts: reads what an estimate needs of a model's files.
        pids: the processes of an instance, from its leader.
    """

    def __init__(
        self,
        gpus: Gpus,
        margin_bytes: int,
        peaks: Peaks | Path,
        *,
        unusable: Callable[[str], str] = lambda _uuid: "",
        on_lost: Callable[[str, str], None] = lambda _uuid, _sentence: None,
        facts: Callable[[ModelSpec], Awaitable[Facts]] = facts_of,
        pids: Callable[[int], Iterable[int]] = members,
    ) -> None:
        self._gpus, self._margin = gpus, margin_bytes
        self._peaks = Peaks(peaks) if isinstance(peaks, Path) else peaks
        self._unusable, self._on_lost = unusable, on_lost
        self._facts, self._pids = facts, pids
        self._inside: list[Claim] = []
        self._queue: list[Claim] = []
        self._tainted: dict[str, tuple[int, str]] = {}
        self._bell = trio.Event()
        self._freeing = ""
        self._freeing_gpus: dict[str, str] = {}

    # ---- asking

    def look_again(self) -> None:
        """Something changed that those who wait should know of: a lane is idle, a reading came."""
        self._bell.set()
        self._bell = trio.Event()

    def waiting(self) -> dict[str, str]:
        """Model -> one sentence, for those that wait for room."""
        return {claim.name: claim.reason for claim in self._queue if claim.reason}

    def promised(self) -> dict[str, int]:
        """Device -> bytes promised to loads in progress beyond what they hold already."""
        return {uuid: count for uuid in self._uuids() if (count := self._promised(uuid))}

    def tainted(self) -> dict[str, str]:
        """Device -> one sentence about memory that did not come back."""
        self._forgive()
        return {uuid: sentence for uuid, (_free, sentence) in self._tainted.items()}

    def held(self) -> dict[str, dict[str, int]]:
        """Model -> device -> GPU memory that it was last seen to hold."""
        return {claim.name: dict(claim.now) for claim in self._inside if claim.now}

    def free(self, reason: str, gpus: Mapping[str, str] | None = None) -> None:
        """End every model outside the CPU as soon as it is idle, for as long as there is a reason; "" stops that.

        Args:
            gpus: GPU -> a reason to end those on it alone.
        """
        self._freeing, self._freeing_gpus = reason, dict(gpus or {})
        self.sample()

    def vram_bytes(self, model: str) -> int:
        """GPU memory that a model was last seen to hold, on all GPUs; 0 when it is not known."""
        return sum(sum(claim.now.values()) for claim in self._inside if claim.name == model)

    # ---- the block

    @contextlib.asynccontextmanager
    async def place(self, who: Occupant) -> AsyncIterator[None]:
        """See `supervisor.host.means.Room`.

        Raises:
            FaultError: `out_of_memory`, when it can never fit; `gpu_failed`, when its GPU is out of use.

        Cancellation: while it waits, the place in the queue is given up; at the end, waiting for the memory is
        shielded and bounded by `BACK_S`.
        """
        if who.spec.model.device == "cpu":
            yield
            return
        if not self._gpus.available:
            await self._gpus.wait_known(KNOWN_S)
        devices = self._devices(who.spec)
        facts = await self._facts(who.spec)
        need = residency.need_of(
            told=who.spec.vram_bytes,
            learned=self._peaks.of(facts.key, devices),
            file_bytes=facts.file_bytes,
            kv_tokens=facts.kv_tokens,
        )
        claim = Claim(who, devices, facts, need, trio.current_time())
        await self._enter(claim)
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):
                await self._leave(claim)

    def _devices(self, spec: ModelSpec) -> tuple[str, ...]:
        """Its device set; without one, engines take the first GPU."""
        return spec.model.devices or self._uuids()[:1]

    def _uuids(self) -> tuple[str, ...]:
        return tuple(self._gpus.readings())

    def _free(self, uuid: str) -> int | None:
        found = self._gpus.device(uuid)
        return None if found is None else found.memory_free_bytes

    async def _enter(self, claim: Claim) -> None:
        self._queue.append(claim)
        told_at = -TELL_AGAIN_S
        try:
            while (reason := self._step(claim)) is not None:
                now = trio.current_time()
                if reason != claim.reason or now >= told_at + TELL_AGAIN_S:
                    if reason != claim.reason:
                        log.info("%s %s", claim.name, reason)
                    claim.reason, told_at = reason, now
                    claim.who.tell(Progress(0, phase="room", text=reason))
                with trio.move_on_after(LOOK_S):
                    await self._bell.wait()
        finally:
            self._queue.remove(claim)
            self.look_again()

    def _step(self, claim: Claim) -> str | None:
        """Try to let it in. Returns why not, or None when it is inside; nothing here waits."""
        self.sample()
        for uuid in claim.devices:
            if reason := self._unusable(uuid):
                raise refuse("gpu_failed", f"{claim.name} cannot be loaded: {reason}")
        if ahead := self._ahead(claim):
            return f"waits for its turn behind {ahead.name}"
        gpus = [self._measure(uuid, total, free) for uuid, total, free in self._measured()]
        residents = [each.resident() for each in self._inside]
        wish = residency.Wish(name=claim.name, devices=claim.devices, need=claim.need)
        verdict = residency.judge(wish, gpus, residents, self._margin)
        claim.foreign = False
        if self._freeing and not claim.who.wanted:
            claim.foreign = True  # it holds up nobody behind it
            return f"waits for the end of a hold: {self._freeing}"
        match verdict:
            case Fits():
                self._admit(claim, verdict)
                return None
            case Never(reason):
                raise refuse("out_of_memory", reason, hint="another GPU, a smaller model, or a smaller context")
            case Evict(who, reason):
                if not claim.who.wanted:
                    return "waits until there is room for a preload"
                self._evict(who, reason)
                return f"waits for its memory: ends idle {', '.join(who)} ({reason})"
            case Wait(reason, on):
                claim.foreign = not on
                if on and claim.who.wanted and self._had_their_time(on, claim):
                    self._evict(on, f"{claim.name} has waited {PATIENCE_S:g} s for its turn")
                return reason

    def _had_their_time(self, names: Sequence[str], waiting: Claim) -> bool:
        """Whether all of these have been loaded, and somebody has waited for them, for `PATIENCE_S`.

        A load is never ended for another, and what was loaded gets to work: else two models that both are wanted
        all the time would only load.
        """
        until = trio.current_time() - PATIENCE_S
        ready = [claim.who.ready_since for claim in self._inside if claim.name in names]
        return waiting.since <= until and all(since is not None and since <= until for since in ready)

    def _ahead(self, claim: Claim) -> Claim | None:
        """Who came before and wants the same GPU, and can be helped by us."""
        for other in self._queue[: self._queue.index(claim)]:
            if set(other.devices) & set(claim.devices) and other.who.wanted and not other.foreign:
                return other
        return None

    def _admit(self, claim: Claim, verdict: Fits) -> None:
        if verdict.note:
            log.info("%s loads: %s", claim.name, verdict.note)
        claim.takes = dict(verdict.takes)
        claim.before = {uuid: free for uuid in claim.devices if (free := self._free(uuid)) is not None}
        claim.reason = ""
        claim.others = self._others(claim)
        self._inside.append(claim)

    def _evict(self, names: Sequence[str], reason: str) -> None:
        for claim in self._inside:
            if claim.name in names and not claim.leaving:
                log.info("%s is ended: %s", claim.name, reason)
                claim.leaving = True
                claim.who.evict(reason)

    # ---- measuring

    def _measured(self) -> list[tuple[str, int, int]]:
        """(uuid, total, free) of every GPU and MIG device that tells both."""
        if not self._gpus.available:
            return []
        return [
            (uuid, found.memory_total_bytes, found.memory_free_bytes)
            for uuid, found in devices(self._gpus.readings())
            if found.memory_total_bytes and found.memory_free_bytes is not None
        ]

    def _measure(self, uuid: str, total: int, free: int) -> residency.Device:
        return residency.Device(
            uuid=uuid,
            free_bytes=free,
            total_bytes=total,
            promised_bytes=self._promised(uuid),
            tainted=self.tainted().get(uuid, ""),
        )

    def _promised(self, uuid: str) -> int:
        return sum(claim.promised(uuid) for claim in self._inside)

    def sample(self) -> None:
        """Look at what everybody holds; a model seen idle for the first time is settled, and its peak learned."""
        for claim in self._inside:
            reason = self._freeing or next(
                (text for uuid in claim.devices if (text := self._freeing_gpus.get(uuid))), ""
            )
            if reason and claim.who.idle_since is not None and not claim.who.wanted:
                self._evict([claim.name], reason)
        if not self._gpus.available:
            return
        for claim in self._inside:
            if not claim.who.pid:
                continue
            claim.now = self._held(claim)
            for uuid, count in claim.now.items():
                claim.held[uuid] = max(claim.held.get(uuid, 0), count)
            self._settle(claim)
            if claim.settled and claim.held != claim.learned:
                claim.learned = dict(claim.held)
                self._peaks.learn(claim.facts.key, claim.held)
        for claim in self._inside:
            if claim.who.pid:
                claim.others = self._others(claim)

    def _settle(self, claim: Claim) -> None:
        """Once it has been idle for a while, what it holds is what it takes; nothing, if free memory says so too."""
        idle_since = claim.who.idle_since
        if claim.settled or idle_since is None or trio.current_time() < idle_since + SETTLE_S:
            return
        alone = all(other is claim or other.settled for other in self._inside)
        claim.settled = True
        if alone and not any(claim.held.values()):
            claim.held = dict.fromkeys(claim.devices, 0)

    def _others(self, claim: Claim) -> dict[str, int]:
        found = {uuid: self._not_ours(uuid) for uuid in {*claim.devices, *claim.now}}
        return {uuid: count for uuid, count in found.items() if count is not None}

    def _held(self, claim: Claim) -> dict[str, int]:
        """Device -> bytes that it holds: by its processes, else by how much less is free than when it entered."""
        if told := self._gpus.used_by(self._pids(claim.who.pid)):
            return dict(told)
        if claim.settled or any(other is not claim and not other.settled for other in self._inside):
            return claim.now  # several are growing: whose memory that is cannot be told
        held = {}
        for uuid, before in claim.before.items():
            if (free := self._free(uuid)) is not None and before - free > SLACK_BYTES:
                held[uuid] = min(before - free, claim.takes.get(uuid) or before - free)
        return held or claim.now

    async def keep_learning(self) -> None:
        """Learn peaks while nobody waits. Runs until cancelled."""
        while True:
            await trio.sleep(LEARN_S)
            self.sample()

    # ---- leaving

    async def _leave(self, claim: Claim) -> None:
        """Wait until the memory is back, or say that it is not."""
        claim.leaving = True
        try:
            if any({**claim.takes, **claim.held}.values()) and self._gpus.available:
                await self._watch_it_come_back(claim)
        finally:
            self._inside.remove(claim)
            self.look_again()

    async def _watch_it_come_back(self, claim: Claim) -> None:
        def back(_readings: Mapping[str, GpuReading]) -> bool:
            return not self._lost(claim)

        if await self._gpus.wait_for(back, BACK_S):
            return
        for uuid, lack in self._lost(claim).items():
            text = (
                f"{gib(lack)} of {short(uuid)} did not come back within {BACK_S:g} s after {claim.name} had ended: "
                "another program took it, or the driver lost it"
            )
            log.warning("%s", text)
            free = self._free(uuid) or 0
            self._tainted[uuid] = (free + lack - SLACK_BYTES, text)
            self._on_lost(uuid, text)

    def _lost(self, claim: Claim) -> dict[str, int]:
        """Device -> bytes that are nobody's of ours now and were not nobody's before the claim's end."""
        lost = {}
        for uuid, before in claim.others.items():
            now = self._not_ours(uuid, without=claim)
            if now is not None and now > before + SLACK_BYTES:
                lost[uuid] = now - before
        return lost

    def _not_ours(self, uuid: str, without: Claim | None = None) -> int | None:
        """Bytes in use that none of our instances holds; None when it is not known."""
        for each, total, free in self._measured():
            if each == uuid:
                ours = sum(claim.now.get(uuid, 0) for claim in self._inside if claim is not without)
                return total - free - ours
        return None

    def _forgive(self) -> None:
        """Forget a taint when the memory is there after all."""
        for uuid, (floor, _sentence) in list(self._tainted.items()):
            free = self._free(uuid)
            if free is not None and free >= floor:
                log.info("the memory of %s is back", short(uuid))
                del self._tainted[uuid]
