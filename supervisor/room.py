"""Room in GPU memory: what the GPUs have, what our models hold of it, and whether it came back.

Theory of operation. Nothing is decided here: `intake.scheduler` does that, and this module tells it what is measured.
Every instance lives inside one `place` block: entered before its process is started, left after the process has ended
and its memory is back. Readings of the telemetry come once a second; with each, what every instance holds is looked
at, and what is left is what other programs hold. So what counts is the memory that the driver measures, never what
should have come back.

A load has a promise (its share), so that two loads at once are not both told that there is room. When the model has
been idle for a moment, what it holds is what it takes: that is told, and learned for the next time.

All methods belong to the trio thread. GPU telemetry comes from a child; without it everybody fits.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path

import trio

from supervisor.claims import Claim, Gpus
from supervisor.host.family import members
from supervisor.host.means import Books, Occupant
from supervisor.host.work import ModelSpec
from supervisor.intake import effects as fx
from supervisor.intake import residency
from supervisor.intake.residency import gib, short
from supervisor.machine.readings import Device, GpuReading, devices
from supervisor.peaks import Facts, Peaks, facts_of, whole_need

log = logging.getLogger(__name__)

# After the end of a process its memory is back within 2 s on every driver seen; twice that on a loaded box.
BACK_S = 10.0
# What may be missing from it all the same: the driver's own bookkeeping.
SLACK_BYTES = 64 * 2**20
# Readings come once a second: what a model holds is known this long after it became idle.
SETTLE_S = 2.0
# How long loads wait for the first reading: at boot the driver may need seconds, a hung one never answers.
KNOWN_S = 10.0
# How often the memory of loaded models is looked at, besides with each reading.
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

    measures = True

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
        self._gpus, self.margin_bytes = gpus, margin_bytes
        self._peaks = Peaks(peaks) if isinstance(peaks, Path) else peaks
        self._unusable, self._on_lost = unusable, on_lost
        self._facts, self._pids = facts, pids
        self._books: Books | None = None
        self._inside: list[Claim] = []
        self._seen: dict[str, Facts] = {}  # by model, as last looked at
        self._tells = False  # the driver was seen to tell what processes hold
        self._tainted: dict[str, tuple[int, str]] = {}
        self._known = False  # whether it was told which GPUs there are
        self._listed: tuple[fx.DevicePlan, ...] | None = None
        self._broken: dict[str, str] = {}
        self._told: dict[str, fx.Reading] = {}
        self._holds: dict[str, fx.HoldPut] = {}

    # ---- whoever decides

    def bind(self, books: Books) -> None:
        """See `supervisor.host.means.Room`."""
        self._books = books
        self._gpus.subscribe(lambda _readings: self.sample())

    async def open(self) -> None:
        """Tell which GPUs there are, as soon as that is known; after `KNOWN_S`, that none is."""
        if not self._gpus.available:
            await self._gpus.wait_known(KNOWN_S)
        self._known = True
        self.sample()

    async def need(self, spec: ModelSpec) -> tuple[int, bool]:
        """What a load will take of a GPU, and whether that is a mere estimate."""
        facts = self._seen[spec.name] = await self._facts(spec)
        return self._need(spec, facts)

    def _need(self, spec: ModelSpec, facts: Facts) -> tuple[int, bool]:
        """What neither has files nor a word of the operator nor a device set is not placed: it may use anything."""
        free = not (spec.vram_bytes or spec.model.devices or facts.file_bytes)
        need = residency.need_of(
            told=spec.vram_bytes,
            learned=None if free else self._peaks.most(facts.key, spec.model.devices),
            file_bytes=facts.file_bytes,
            kv_tokens=facts.kv_tokens,
        )
        # What was once seen on a GPU fits it, though it left less than the margin: it is not refused for ever.
        totals = [each.total_bytes for each in self._listed or () if each.uuid in (spec.model.devices or (each.uuid,))]
        seen = need.source == "learned" and need.bytes <= max(totals, default=0)
        return need.bytes, seen or need.source in ("estimated", "none")

    # ---- asking

    def look_again(self) -> None:
        """Something changed that whoever decides should know of: the health of a GPU."""
        self.sample()

    def waiting(self) -> dict[str, str]:
        """Model -> one sentence, for those that wait to be loaded."""
        if self._books is None:
            return {}
        return {model: self._with_taint(text) for model, text in self._books.waits().items()}

    def _with_taint(self, text: str) -> str:
        taints = [sentence for uuid, sentence in self.tainted().items() if f"on {short(uuid)}" in text]
        return f"{text} ({'; '.join(taints)})" if taints else text

    def promised(self) -> dict[str, int]:
        """Device -> bytes promised to loads in progress beyond what they hold already."""
        return {uuid: count for uuid, _found in devices(self._gpus.readings()) if (count := self._promised(uuid))}

    def tainted(self) -> dict[str, str]:
        """Device -> one sentence about memory that did not come back."""
        self._forgive()
        return {uuid: sentence for uuid, (_free, sentence) in self._tainted.items()}

    def held(self) -> dict[str, dict[str, int]]:
        """Model -> device -> GPU memory that its instances were last seen to hold."""
        found: dict[str, dict[str, int]] = {}
        for claim in self._inside:
            for uuid, count in claim.now.items():
                by_gpu = found.setdefault(claim.name, {})
                by_gpu[uuid] = by_gpu.get(uuid, 0) + count
        return found

    def free(
        self, reason: str, gpus: Mapping[str, str] | None = None, *, cordons: Mapping[str, str] | None = None
    ) -> None:
        """End every model on a GPU as soon as it has no work, for as long as there is a reason; "" stops that.

        Args:
            gpus: GPU -> a reason to end those on it alone.
            cordons: GPU -> a reason to load nothing there, unless it can go nowhere else.
        """
        wanted = {uuid: fx.HoldPut(uuid, why, finish=True) for uuid, why in (cordons or {}).items() if why}
        wanted |= {uuid: fx.HoldPut(uuid, why, unload=True, finish=True) for uuid, why in (gpus or {}).items() if why}
        if reason:
            wanted[""] = fx.HoldPut("", reason, unload=True, finish=True)
        for uuid in [uuid for uuid in self._holds if uuid not in wanted]:
            del self._holds[uuid]
            self._tell(fx.HoldLifted(uuid))
        for uuid, hold in wanted.items():
            if self._holds.get(uuid) != hold:
                self._holds[uuid] = hold
                self._tell(hold)

    def vram_bytes(self, model: str) -> int:
        """GPU memory that an instance of a model was last seen to hold, on all GPUs; 0 when it is not known."""
        held = [sum(claim.now.values()) for claim in self._inside if claim.name == model]
        return sum(held) // len(held) if held else 0

    # ---- the block

    @contextlib.asynccontextmanager
    async def place(
        self, who: Occupant, number: int = 0, shares: Mapping[str, int] | None = None
    ) -> AsyncIterator[None]:
        """See `supervisor.host.means.Room`.

        Cancellation: at the end, waiting for the memory is shielded and bounded by `BACK_S`.
        """
        if who.spec.model.device == "cpu":
            yield
            return
        facts = self._seen.get(who.spec.name) or await self._facts(who.spec)
        claim = Claim(who, number, self._devices(who.spec, shares or {}), facts, shares or {})
        claim.before = {uuid: free for uuid in claim.devices if (free := self._free(uuid)) is not None}
        claim.others = self._others(claim)
        self._inside.append(claim)
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):
                await self._leave(claim)

    def _devices(self, spec: ModelSpec, shares: Mapping[str, int]) -> tuple[str, ...]:
        """Its device set; without one, engines take the first GPU."""
        return tuple(shares) or spec.model.devices or tuple(self._gpus.readings())[:1]

    def _free(self, uuid: str) -> int | None:
        found = self._gpus.device(uuid)
        return None if found is None else found.memory_free_bytes

    # ---- telling

    def _tell(self, event: fx.Event) -> None:
        if self._books is not None:
            self._books.tell(event)

    def _tell_all(self) -> None:
        """Tell what has changed of the GPUs: which there are, which work, who holds what."""
        listed = tuple(self._plans())
        if not listed and not self._known:
            return
        if listed != self._listed:
            self._known, self._listed = True, listed
            self._tell(fx.Listed(listed))
            self._broken.clear()  # all of it is told anew: nobody knows more of a GPU than that it is there
            self._told.clear()
            for hold in self._holds.values():
                self._tell(hold)
        for plan in listed:
            reason = self._unusable(plan.uuid)
            if reason != self._broken.get(plan.uuid):
                self._broken[plan.uuid] = reason
                self._tell(fx.Broken(plan.uuid, reason))
        for uuid, _total, _free in self._measured():
            held = {claim.number: count for claim in self._inside if (count := claim.now.get(uuid, 0))}
            reading = fx.Reading(uuid, max(0, self._not_ours(uuid) or 0), held)
            if reading != self._told.get(uuid):
                self._told[uuid] = reading
                self._tell(reading)

    def _plans(self) -> Iterable[fx.DevicePlan]:
        """GPUs that models may be placed on; of one that is cut into MIG devices, these."""
        if not self._gpus.available:
            return
        for gpu in self._gpus.readings().values():
            found: Sequence[Device] = gpu.mig or (gpu,)
            for each in found:
                if each.memory_total_bytes and each.memory_free_bytes is not None:
                    yield fx.DevicePlan(uuid=each.uuid, total_bytes=each.memory_total_bytes)

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

    def _promised(self, uuid: str) -> int:
        return sum(claim.promised(uuid) for claim in self._inside)

    def sample(self) -> None:
        """Look at what everybody holds, and tell it."""
        if self._gpus.available:
            self._look()
        if self._books is not None:
            self._tell_all()

    def _look(self) -> None:
        """A model seen idle for the first time is settled, and its peak learned."""
        for claim in self._inside:
            if not claim.who.pid:
                continue
            claim.now = self._held(claim)
            for uuid, count in claim.now.items():
                claim.held[uuid] = max(claim.held.get(uuid, 0), count)
            self._settle(claim)
            if claim.settled and claim.held != claim.learned:
                claim.learned = dict(claim.held)
                self._peaks.learn(claim.facts.key, whole_need(claim.held))
                self._tell(fx.Learned(claim.name, *self._need(claim.who.spec, claim.facts)))
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
        if any(claim.held.values()) or alone:  # else whose memory that is cannot be told, and the promise stays
            self._tell(fx.Settles(claim.number, dict(claim.now)))

    def _others(self, claim: Claim) -> dict[str, int]:
        """Device -> bytes that are nobody's of ours.

        Never below nothing, which is what a reading gives when a process is dead already and its memory still counted
        as held: more could not come back than there is.
        """
        found = {uuid: self._not_ours(uuid) for uuid in {*claim.devices, *claim.now}}
        return {uuid: max(0, count) for uuid, count in found.items() if count is not None}

    def _held(self, claim: Claim) -> dict[str, int]:
        """Device -> bytes that it holds: by its processes, else by how much less is free than when it entered."""
        if told := self._gpus.used_by(self._pids(claim.who.pid)):
            self._tells = True
            return dict(told)
        if self._tells:  # a driver that tells of processes says that this one has nothing yet
            return claim.now
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
            self.sample()  # before it is said to be gone: what did not come back is somebody else's

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
