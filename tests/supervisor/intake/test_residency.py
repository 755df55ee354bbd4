"""Which models may be in GPU memory together: tables of situations and verdicts."""

from __future__ import annotations

import itertools
import random

import pytest

from supervisor.intake import eviction
from supervisor.intake.residency import (
    CONTEXT_BYTES,
    GIB,
    KV_BYTES_PER_TOKEN,
    Device,
    Evict,
    Fits,
    Need,
    Never,
    Resident,
    Wait,
    Wish,
    judge,
    need_of,
)

A, B = "GPU-aaaaaaaa-1", "GPU-bbbbbbbb-2"


def gpu(free: float, total: float = 24, *, uuid: str = A, promised: float = 0, tainted: str = "") -> Device:
    return Device(
        uuid=uuid,
        free_bytes=int(free * GIB),
        total_bytes=int(total * GIB),
        promised_bytes=int(promised * GIB),
        tainted=tainted,
    )


def wish(size: float, *devices: str, source: str = "learned") -> Wish:
    return Wish(name="new", devices=devices or (A,), need=Need(int(size * GIB), source))


def idle(name: str, size: float, since: float, *, on: str = A, **more: object) -> Resident:
    return Resident(name=name, holds={on: int(size * GIB)}, idle_since=since, **more)


def busy(name: str, size: float, *, on: str = A) -> Resident:
    return Resident(name=name, holds={on: int(size * GIB)}, wanted=True)


def decide(wish: Wish, devices: list[Device], residents: list[Resident], margin: float = 0.5):
    return judge(wish, devices, residents, int(margin * GIB))


# ---- what a load needs


@pytest.mark.parametrize(
    ("told", "learned", "files", "tokens", "need"),
    [
        (5, 7, 100, 10, Need(5, "operator")),
        (0, 7, 100, 10, Need(7, "learned")),
        (0, 0, 100, 10, Need(0, "learned")),
        (0, None, 1000, 2, Need(1100 + 2 * KV_BYTES_PER_TOKEN + CONTEXT_BYTES, "estimated")),
        (0, None, 0, 10, Need(0, "none")),
    ],
)
def test_the_best_source_of_a_need(told, learned, files, tokens, need):
    assert need_of(told=told, learned=learned, file_bytes=files, kv_tokens=tokens) == need


# ---- what fits


@pytest.mark.parametrize(
    ("asked", "devices", "fits"),
    [
        (wish(10), [gpu(10.5)], True),
        (wish(10), [gpu(10.4)], False),  # the margin
        (wish(10), [gpu(20, promised=9.5)], True),
        (wish(10), [gpu(20, promised=9.6)], False),  # promised to another load
        (wish(10, A, B), [gpu(11), gpu(11, uuid=B)], True),
        (wish(10, A, B), [gpu(20), gpu(10, uuid=B)], False),  # each of the set, not their sum
        (wish(10, B), [gpu(1), gpu(11, uuid=B)], True),
    ],
)
def test_what_fits(asked, devices, fits):
    verdict = decide(asked, devices, [])
    assert isinstance(verdict, Fits) == fits
    if fits:
        assert verdict == Fits(dict.fromkeys(asked.devices, 10 * GIB))


def test_nothing_is_invented_about_a_gpu_that_is_not_measured():
    for devices in ([], [gpu(1, uuid=B)]):
        verdict = decide(wish(10), devices, [])
        assert isinstance(verdict, Fits)
        assert verdict.takes == {}
        assert "not known" in verdict.note


def test_a_model_without_a_device_or_a_need_fits():
    assert decide(Wish(name="new", devices=(), need=Need(GIB, "operator")), [gpu(0)], []) == Fits()
    assert decide(wish(0, source="none"), [gpu(0)], []) == Fits()


# ---- what never fits


def test_what_is_larger_than_the_largest_gpu_never_fits():
    verdict = decide(wish(30, source="operator"), [gpu(23), gpu(10, 11, uuid=B)], [idle("x", 1, 0)])
    assert verdict == Never(
        "new needs 30.0 GiB of GPU memory, and the largest GPU has 24.0 GiB (0.5 GiB of it stay free); "
        "vram_gb of the model says so."
    )


def test_what_is_larger_than_its_own_gpu_never_fits():
    verdict = decide(wish(12, B), [gpu(23), gpu(10, 11, uuid=B)], [])
    assert isinstance(verdict, Never)
    assert "GPU-bbbbbbbb… has 11.0 GiB" in verdict.reason


def test_a_mere_estimate_refuses_nothing_and_takes_the_whole_gpu():
    assert decide(wish(30, source="estimated"), [gpu(24)], []) == Fits({A: int(23.5 * GIB)})
    assert isinstance(decide(wish(30, source="estimated"), [gpu(14)], [idle("x", 10, 0)]), Evict)


# ---- who has to go


@pytest.mark.parametrize(
    ("need", "residents", "who"),
    [
        (10, [idle("young", 10, 9), idle("old", 10, 1)], ("old",)),  # the least recently used
        (10, [idle("a", 3, 1), idle("b", 3, 2), idle("c", 10, 3)], ("c",)),  # one instead of three
        (10, [idle("a", 6, 1), idle("b", 6, 2), idle("c", 6, 3)], ("a", "b")),  # older ones among equals
        (10, [idle("a", 1, 1), idle("b", 4, 2), idle("c", 9, 3)], ("a", "c")),
        (10, [busy("a", 20), idle("b", 10, 5)], ("b",)),  # a working one is left alone
        (10, [idle("pinned", 10, 1, pinned=True), idle("b", 10, 5)], ("b",)),
        (10, [idle("wanted", 10, 1, wanted=True), idle("b", 10, 5)], ("b",)),
        (10, [idle("elsewhere", 10, 1, on=B), idle("b", 10, 5)], ("b",)),
    ],
)
def test_who_is_ended(need, residents, who):
    verdict = decide(wish(need), [gpu(0.5), gpu(0.5, uuid=B)], residents)
    assert isinstance(verdict, Evict)
    assert verdict.who == who
    assert verdict.reason == "new needs 10.0 GiB on GPU-aaaaaaaa…"


def test_a_set_of_devices_gets_room_on_each():
    verdict = decide(
        wish(5, A, B), [gpu(0.5), gpu(0.5, uuid=B)], [idle("a", 5, 2), idle("b", 5, 1, on=B), idle("c", 5, 3)]
    )
    assert isinstance(verdict, Evict)
    assert verdict.who == ("b", "a")


def test_nobody_is_ended_for_a_model_that_is_the_resident_itself():
    assert isinstance(decide(wish(10), [gpu(0.5)], [idle("new", 10, 1)]), Wait)


# ---- who is waited for


def test_what_is_leaving_is_waited_for_and_nobody_else_ended():
    verdict = decide(wish(10), [gpu(0.5)], [idle("gone", 10, 1, leaving=True), idle("b", 10, 5)])
    assert verdict == Wait("waits for 10.0 GiB on GPU-aaaaaaaa…: gone is ending", ("gone",))


def test_working_ones_are_waited_for():
    verdict = decide(wish(10), [gpu(0.5)], [busy("a", 8), busy("b", 8), idle("c", 1, 1)])
    assert verdict == Wait("waits for 10.0 GiB on GPU-aaaaaaaa…: a, b are working", ("a", "b"))


def test_other_programs_are_waited_for_by_name_of_what_they_hold():
    verdict = decide(wish(20), [gpu(4)], [busy("a", 2)])
    assert verdict == Wait("waits for 16.5 GiB on GPU-aaaaaaaa…: other programs hold 18.0 GiB there")


def test_memory_that_was_lost_is_named():
    verdict = decide(wish(20), [gpu(4, tainted="3 GiB did not come back")], [])
    assert isinstance(verdict, Wait)
    assert verdict.reason.endswith("3 GiB did not come back")
    assert verdict.on == ()


def test_many_candidates_do_not_take_for_ever():
    many = [idle(f"m{number}", 1, number) for number in range(60)]
    verdict = decide(wish(30), [gpu(0.5, 80)], many)
    assert isinstance(verdict, Evict)
    assert verdict.who == tuple(f"m{number}" for number in range(30))


@pytest.mark.parametrize("seed", range(40))
def test_a_verdict_keeps_its_word(seed):
    """Whatever the situation: what is ended suffices, nobody is ended in vain, and no busy one ever."""
    dice = random.Random(seed)
    residents = []
    for number in range(dice.randint(0, 15)):
        size = dice.randint(1, 6)
        one = idle(f"m{number}", size, dice.random()) if dice.random() < 0.7 else busy(f"m{number}", size)
        residents.append(one)
    need, free = dice.randint(1, 40), dice.randint(0, 10)
    verdict = decide(wish(need), [gpu(free, 80)], residents)
    by_name = {resident.name: resident for resident in residents}
    lack = need + 0.5 - free
    sizes = {name: resident.holds[A] / GIB for name, resident in by_name.items()}
    if isinstance(verdict, Fits):
        assert lack <= 0
    elif isinstance(verdict, Evict):
        assert all(by_name[name].idle for name in verdict.who)
        assert sum(sizes[name] for name in verdict.who) >= lack
        for left_out in verdict.who:
            assert sum(sizes[name] for name in verdict.who if name != left_out) < lack
        if len(residents) <= eviction.EXACT_SEARCH:
            idles = [name for name, resident in by_name.items() if resident.idle]
            smaller = itertools.combinations(idles, len(verdict.who) - 1)
            assert all(sum(sizes[name] for name in names) < lack for names in smaller)
    else:
        assert isinstance(verdict, Wait)
        assert sum(sizes[name] for name, resident in by_name.items() if resident.idle) < lack


# ---- cost and groups


def test_reload_cost_and_demand_choose_who_is_ended():
    """The least recently used one is in demand and slow to load: the other goes."""
    dear = idle("dear", 10, 1, load_s=40.0, per_s=0.2)
    cheap = idle("cheap", 10, 9, load_s=4.0, per_s=0.01)
    verdict = decide(wish(10), [gpu(0.5)], [dear, cheap])
    assert isinstance(verdict, Evict)
    assert verdict.who == ("cheap",)


def test_two_quiet_ones_go_before_one_in_demand():
    dear = idle("dear", 10, 1, load_s=40.0, per_s=0.2)
    quiet = [idle(name, 5, 5, load_s=4.0) for name in ("a", "b")]
    verdict = decide(wish(10), [gpu(0.5)], [dear, *quiet])
    assert isinstance(verdict, Evict)
    assert verdict.who == ("a", "b")


@pytest.mark.parametrize(
    ("rivals", "verdict"),
    [
        (
            [idle("r", 1, 5, group="x")],
            Evict(("r",), "new takes its turn: only one model of the group x may be loaded"),
        ),
        (
            [Resident(name="r", holds={A: GIB}, wanted=True, group="x")],
            Wait("waits for r: only one model of the group x may be loaded", ("r",)),
        ),
        (
            [idle("r", 1, 5, group="x", pinned=True)],
            Wait("waits for r: only one model of the group x may be loaded, and a pinned one stays"),
        ),
        (
            [idle("r", 1, 5, group="x", leaving=True)],
            Wait("waits for r to end: only one model of the group x may be loaded", ("r",)),
        ),
        ([idle("r", 1, 5, group="y")], Fits({A: 5 * GIB})),
    ],
)
def test_only_one_of_an_exclusive_group(rivals, verdict):
    asked = Wish(name="new", devices=(A,), need=Need(5 * GIB, "learned"), group="x")
    assert decide(asked, [gpu(20)], rivals) == verdict


def test_what_was_once_loaded_on_a_gpu_is_not_refused_there_for_want_of_a_margin():
    assert isinstance(decide(wish(23.8), [gpu(24)], [], margin=0.5), Fits)
    assert isinstance(decide(wish(24.5), [gpu(24)], [], margin=0.5), Never)
    assert isinstance(decide(wish(23.8, source="operator"), [gpu(24)], [], margin=0.5), Never)
