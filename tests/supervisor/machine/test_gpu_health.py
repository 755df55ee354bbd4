"""The states of a GPU: what quarantines it, what does not, and how it comes back."""

from __future__ import annotations

import os
import random

import pytest

from supervisor.machine.gpu_health import FIRST_TRIAL_S, LONGEST_TRIAL_S, STRIKES_S, GpuHealth, State
from supervisor.machine.gpu_words import GpuFault
from supervisor.machine.readings import GpuEvent, GpuReading, MigDevice
from supervisor.machine.xids import XIDS, Action, Owner

GPU, OTHER = "GPU-1", "GPU-2"


class Box:
    """Two healthy GPUs, a clock, and a record of changes."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.changed: list[str] = []
        self.health = GpuHealth(lambda: self.now, self.changed.append)
        self.read()

    def read(self, **fields: object) -> None:
        self.health.note_readings({GPU: GpuReading(uuid=GPU, **fields), OTHER: GpuReading(uuid=OTHER)})

    def xid(self, number: int, uuid: str = GPU) -> None:
        self.health.note_event(GpuEvent(kind="xid", uuid=uuid, xid=number))

    @property
    def state(self) -> State:
        return self.health.of(GPU).state

    def wait_for_trial(self) -> None:
        self.now = self.health.next_due()
        assert self.health.due() == [GPU]


@pytest.fixture
def box() -> Box:
    return Box()


def test_a_healthy_gpu_is_usable_and_so_is_one_that_nobody_heard_of(box):
    assert box.health.usable(GPU) == box.health.usable("GPU-new") == ""
    assert box.health.next_due() == float("inf")
    assert box.changed == []


@pytest.mark.parametrize("number", sorted(XIDS))
def test_every_xid_leads_to_its_state_and_touches_no_other_gpu(box, number):
    box.xid(number)
    line = XIDS[number]
    if line.fatal:
        expected = State.QUARANTINED
    elif line.owner is Owner.APPLICATION or line.action is Action.IGNORE:
        expected = State.HEALTHY
    else:
        expected = State.SUSPECT
    assert box.state is expected
    assert box.health.usable(OTHER) == ""
    assert box.health.faults == {(GPU, f"xid-{number}"): 1}
    assert (f"Xid {number}" in box.health.usable(GPU)) == (expected is not State.HEALTHY)


def test_the_sentence_names_the_gpu_the_reason_and_the_cure(box):
    box.xid(79)
    assert box.health.usable(GPU) == (
        "GPU GPU-1 is quarantined: Xid 79 (GPU has fallen off the bus); the machine needs a reboot."
    )
    box.xid(95, OTHER)
    assert "it needs a reset (nvidia-smi --gpu-reset) or a reboot" in box.health.usable(OTHER)


@pytest.mark.parametrize("kind", ["ecc-double-bit", "retirement-failure", "poison-fatal", "unavailable"])
def test_events_that_are_no_xid_quarantine_as_well(box, kind):
    box.health.note_event(GpuEvent(kind=kind, uuid=GPU))
    assert box.state is State.QUARANTINED


def test_an_event_that_names_no_gpu_makes_all_of_them_suspect(box):
    box.health.note_event(GpuEvent(kind="lost", text="GPU is lost"))
    assert [box.health.of(uuid).state for uuid in (GPU, OTHER)] == [State.SUSPECT, State.SUSPECT]
    assert box.health.due() == [GPU, OTHER]


def test_an_unknown_event_is_a_doubt(box):
    box.health.note_event(GpuEvent(kind="event-0x40000", uuid=GPU))
    assert box.state is State.SUSPECT


@pytest.mark.parametrize(
    ("action", "state"),
    [
        ("none", State.HEALTHY),
        ("", State.HEALTHY),
        ("drain-p2p", State.HEALTHY),
        ("reset", State.QUARANTINED),
        ("drain-and-reset", State.QUARANTINED),
        ("reboot", State.QUARANTINED),
    ],
)
def test_what_the_driver_wants_decides(box, action, state):
    box.read(recovery_action=action)
    assert box.state is state
    other = Box()
    other.health.note_event(GpuEvent(kind="recovery-action", uuid=GPU, action=action))
    assert other.state is state


def test_a_lost_gpu_in_a_reading_is_quarantined_once(box):
    for _ in range(5):
        box.read(error="NVMLError_GpuIsLost: GPU is lost")
    assert box.state is State.QUARANTINED
    assert box.health.of(GPU).action is Action.REBOOT
    assert box.changed == [GPU]


# ---- coming back


def test_a_suspect_that_passes_its_trial_is_healthy_again(box):
    box.xid(94)
    assert "it is being tried" in box.health.usable(GPU)
    assert box.health.due() == [GPU]
    box.health.tried(GPU, "")
    assert box.health.usable(GPU) == ""
    assert box.health.due() == []


def test_a_suspect_that_fails_its_trial_is_quarantined_for_that(box):
    box.xid(94)
    box.health.tried(GPU, "cuCtxCreate failed: CUDA_ERROR_UNKNOWN (999)")
    assert box.state is State.QUARANTINED
    assert "CUDA_ERROR_UNKNOWN" in box.health.usable(GPU)


def test_a_trial_on_a_full_gpu_is_passed(box):
    box.xid(94)
    box.health.tried(GPU, "cuMemAlloc_v2 failed: CUDA_ERROR_OUT_OF_MEMORY (2)")
    assert box.state is State.HEALTHY


def test_a_quarantined_gpu_is_tried_with_growing_pauses_and_keeps_its_first_reason(box):
    box.xid(48)
    pauses = []
    for _ in range(9):
        before = box.now
        box.wait_for_trial()
        pauses.append(box.now - before)
        box.health.tried(GPU, "cuInit failed")
    assert pauses[:4] == [FIRST_TRIAL_S, FIRST_TRIAL_S, 2 * FIRST_TRIAL_S, 4 * FIRST_TRIAL_S]
    assert pauses[-1] == LONGEST_TRIAL_S
    assert "Xid 48" in box.health.usable(GPU)
    box.wait_for_trial()
    box.health.tried(GPU, "")
    assert box.state is State.HEALTHY


def test_it_does_not_come_back_while_the_driver_still_wants_something(box):
    box.read(recovery_action="reset")
    box.wait_for_trial()
    box.health.tried(GPU, "")
    assert box.state is State.QUARANTINED
    box.read(recovery_action="none")
    box.wait_for_trial()
    box.health.tried(GPU, "")
    assert box.state is State.HEALTHY


def test_the_third_doubt_within_ten_minutes_quarantines(box):
    for expected in (State.SUSPECT, State.SUSPECT, State.QUARANTINED):
        box.now += 60
        box.xid(94)
        assert box.state is expected
        if expected is State.SUSPECT:
            box.health.tried(GPU, "")
    assert "3. doubt" in box.health.usable(GPU)


def test_doubts_that_are_old_are_forgotten(box):
    for _ in range(6):
        box.now += STRIKES_S / 2 + 1
        box.xid(94)
        assert box.state is State.SUSPECT
        box.health.tried(GPU, "")


def test_what_follows_a_fatal_fault_does_not_replace_its_reason(box):
    box.xid(48)
    box.xid(94)
    box.xid(64)
    assert "Xid 48" in box.health.usable(GPU)
    box.xid(79)
    assert box.health.of(GPU).action is Action.REBOOT
    assert "Xid 48" in box.health.usable(GPU)
    assert "Xid 79" in box.health.usable(GPU)


# ---- words


def test_words_about_the_device_cost_a_trial_and_never_a_quarantine(box):
    verdict = box.health.note_engine([GPU], ["CUDA error: uncorrectable ECC error encountered"])
    assert verdict is not None
    assert verdict.fault is GpuFault.DEVICE
    assert box.state is State.SUSPECT
    box.health.tried(GPU, "")
    assert box.health.usable(GPU) == ""


@pytest.mark.parametrize(
    "line", ["CUDA error: out of memory", "CUDA error: an illegal memory access was encountered", "bye"]
)
def test_words_about_the_program_leave_the_gpu_alone(box, line):
    box.health.note_engine([GPU], [line])
    assert box.state is State.HEALTHY


def test_memory_that_does_not_come_back_is_a_doubt(box):
    box.health.note_not_returned(GPU, "2.0 GiB of an ended engine did not come back within 10 s")
    assert "did not come back" in box.health.usable(GPU)


# ---- processes that cannot be killed


def test_an_unkillable_process_holds_its_gpus_until_it_is_gone(box):
    box.health.note_unkillable([GPU], 41)
    assert "process 41 holds on to it and cannot be killed" in box.health.usable(GPU)
    box.now += 10_000
    assert box.health.due() == []
    assert box.health.stuck() == {41}
    box.health.note_gone([41])
    assert box.health.due() == [GPU]
    box.health.tried(GPU, "")
    assert box.health.usable(GPU) == ""
    assert box.health.usable(OTHER) == ""


def test_two_unkillable_processes_must_both_be_gone(box):
    box.health.note_unkillable([GPU], 41)
    box.health.note_unkillable([GPU], 42)
    box.health.note_gone([41])
    assert box.health.due() == []
    assert "process 42" in box.health.usable(GPU)
    box.health.note_gone([42])
    assert box.health.due() == [GPU]


def test_a_trial_that_gets_stuck_itself_is_such_a_process(box):
    box.xid(94)
    box.health.tried(GPU, "hangs", 77)
    assert box.health.stuck() == {77}
    assert box.health.due() == []


# ---- MIG, and what survives


def test_a_part_of_a_gpu_shares_its_fate(box):
    box.read(mig=(MigDevice(uuid="MIG-1"),))
    box.xid(79)
    assert "quarantined" in box.health.usable("MIG-1")
    box.health.note_unkillable(["MIG-1"], 5)
    assert box.health.of(GPU).stuck == {5}


def test_quarantine_of_an_earlier_life_is_tried_at_once(box):
    box.health.restore({GPU: "Xid 48 (double bit ECC error)"})
    assert "Xid 48" in box.health.usable(GPU)
    assert box.health.due() == [GPU]


def test_whatever_happens_a_sentence_is_there_exactly_when_it_is_unusable_and_a_way_back():
    seed = int(os.environ.get("SEED", random.randrange(2**32)))  # named by every assertion below
    chance = random.Random(seed)
    for _ in range(300):
        box = Box()
        for _ in range(30):
            box.now += chance.choice([0, 1, 30, 700])
            move = chance.randrange(7)
            if move == 0:
                box.xid(chance.choice([*XIDS, 9999]))
            elif move == 1:
                box.health.tried(
                    GPU, chance.choice(["", "cuInit failed", "CUDA_ERROR_OUT_OF_MEMORY"]), chance.choice([0, 0, 9])
                )
            elif move == 2:
                box.health.note_unkillable([GPU], chance.randrange(1, 4))
            elif move == 3:
                box.health.note_gone([chance.randrange(1, 10)])
            elif move == 4:
                box.read(
                    recovery_action=chance.choice(["none", "reset", "reboot"]),
                    error=chance.choice(["", "", "GPU is lost"]),
                )
            elif move == 5:
                box.health.note_engine([GPU], ["GPU is lost"])
            else:
                box.health.note_event(
                    GpuEvent(kind=chance.choice(["lost", "unavailable"]), uuid=chance.choice(["", GPU]))
                )
            found = box.health.of(GPU)
            assert (box.health.usable(GPU) == "") == (found.state is State.HEALTHY), seed
            assert found.state is State.HEALTHY or found.stuck or found.next_trial < float("inf"), seed
            assert not (found.stuck and GPU in box.health.due()), seed
        box.read(recovery_action="none")
        box.health.note_gone(range(1, 10))
        for uuid in (GPU, OTHER):
            box.health.tried(uuid, "")
        assert box.health.usable(GPU) == "", seed
