from __future__ import annotations

from collections.abc import Iterable

from supervisor.host.work import InstanceStatus
from supervisor.observe.spill import Spill
from supervisor.observe.spillwatch import SETTLED_S, SpillWatch

GIB = 2**30


class Scene:
    """One model, set by the test."""

    def __init__(self, told: int = 0) -> None:
        self.statuses: list[InstanceStatus] = []
        self.ram: dict[int, int] = {}
        self.asked: list[int] = []
        self.spill = Spill()
        self.watch = SpillWatch(
            self.spill, lambda: self.statuses, lambda pid: [pid, pid + 1], {"chat": told}, in_ram=self._in_ram
        )

    def _in_ram(self, pids: Iterable[int]) -> int:
        self.asked += pids
        return sum(self.ram.get(pid, 0) for pid in pids)

    def look(self, pid: int, on_gpu: int, *, idle_s: float | None = SETTLED_S, device: str = "cuda:0") -> str:
        self.statuses = [
            InstanceStatus(
                model="chat", engine="llm", state="ready", pid=pid, device=device, vram_bytes=on_gpu, idle_s=idle_s
            )
        ]
        self.watch.look()
        return self.spill.sentence("chat")


def test_each_load_is_measured_once_with_its_whole_family_and_forgotten_with_it() -> None:
    scene = Scene()
    scene.ram = {10: GIB, 11: GIB, 20: 4 * GIB, 21: 4 * GIB}
    assert scene.look(10, 8 * GIB) == ""
    assert scene.asked == [10, 11]
    assert scene.look(10, 2 * GIB) == "", "it was measured already"
    assert "holds 2.0 of 8.0 GiB" in scene.look(20, 2 * GIB)
    assert scene.asked == [10, 11, 20, 21]
    scene.statuses = []
    scene.watch.look()
    assert scene.spill.sentence("chat") == ""


def test_what_works_just_loaded_or_lies_on_no_gpu_is_not_measured() -> None:
    scene = Scene(told=8 * GIB)
    scene.ram = {10: 9 * GIB}
    assert scene.look(10, 2 * GIB, idle_s=None) == ""
    assert scene.look(10, 2 * GIB, idle_s=SETTLED_S - 1) == ""
    assert scene.look(10, 2 * GIB, device="cpu") == ""
    assert scene.look(10, 0) == ""
    assert scene.asked == []
    assert "holds 2.0 of 8.0 GiB" in scene.look(10, 2 * GIB)


def test_a_system_that_does_not_tell_accuses_nobody() -> None:
    scene = Scene(told=8 * GIB)
    assert scene.look(10, 2 * GIB) == ""
