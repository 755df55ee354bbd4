"""What the room asks of the GPU telemetry, and what it knows of one model that is loaded or wants to be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from supervisor.host.means import Occupant
from supervisor.machine.readings import Device, GpuReading
from supervisor.peaks import Facts


class Gpus(Protocol):
    """What the room asks of the GPU telemetry (`supervisor.machine.telemetry.GpuWatch`)."""

    @property
    def available(self) -> bool:
        """Whether there is a GPU and its state is known."""

    def readings(self) -> Mapping[str, GpuReading]:
        """The latest of each GPU, in the driver's order."""

    def device(self, uuid: str) -> Device | None:
        """One GPU or MIG device; None when it is not known."""

    def used_by(self, pids: Iterable[int]) -> Mapping[str, int]:
        """UUID -> bytes that these processes hold; empty where the driver does not tell."""

    def subscribe(self, on_reading: Callable[[Mapping[str, GpuReading]], None] | None = None) -> Callable[[], None]:
        """Call this with each reading; the function returned ends that."""

    async def wait_known(self, deadline_s: float) -> bool:
        """Wait until something is known about the GPUs (that there is none, too); False when it took too long."""

    async def wait_for(self, predicate: Callable[[Mapping[str, GpuReading]], bool], deadline_s: float) -> bool:
        """Wait until a fresh reading satisfies `predicate`; False when `deadline_s` passed first."""


class Claim:
    """One instance inside the block.

    Attributes:
        number: of the instance.
        takes: device -> promise.
        before: device -> free bytes when it entered.
        held: device -> most that it was seen to hold.
        now: device -> what it was last seen to hold.
        others: device -> what was in use there by nobody of ours when it was last looked at.
        settled: it was seen idle, so that what it holds is what it takes.
        leaving: it has ended.
    """

    def __init__(
        self, who: Occupant, number: int, devices: tuple[str, ...], facts: Facts, takes: Mapping[str, int]
    ) -> None:
        self.who, self.number, self.devices, self.facts = who, number, devices, facts
        self.takes = dict(takes)
        self.before: dict[str, int] = {}
        self.held: dict[str, int] = {}
        self.now: dict[str, int] = {}
        self.others: dict[str, int] = {}
        self.learned: dict[str, int] = {}
        self.settled = False
        self.leaving = False

    @property
    def name(self) -> str:
        """Of its model."""
        return self.who.spec.name

    def promised(self, uuid: str) -> int:
        """What it will still take of a device, beyond what it holds already."""
        if self.settled or self.leaving:
            return 0
        return max(0, self.takes.get(uuid, 0) - self.now.get(uuid, 0))
