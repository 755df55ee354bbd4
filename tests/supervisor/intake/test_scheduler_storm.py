"""Models come and go while others work, pinned and grouped ones too: whoever waits is answered, the books close."""

from __future__ import annotations

import random

import msgspec
import pytest

from supervisor.intake import effects as fx
from tests.supervisor.intake.test_scheduler import GIB, Drive, gpu, model

NAMES = tuple(f"m{number}" for number in range(6))
STEPS = 120
PATIENCE_S = 4000.0
ROUNDS = 12  # of each seed


class Storm(Drive):
    """A drive whose next event is a matter of chance. `Drive` itself asserts that no GPU is given away twice, that no
    group has two models loaded, that nothing is ended at work, and that a model is gone when its instances are."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        more = [gpu("h", 16)] if chance.random() < 0.4 else []
        super().__init__([self.plan(name) for name in NAMES], [gpu("g", 24), *more])
        self.present, self.parting = set(NAMES), set[str]()

    def plan(self, name: str) -> fx.ModelPlan:
        choice = self.chance.choice
        return model(
            name,
            choice([2, 4, 8, 10, 14]),
            pin=self.chance.random() < 0.2,
            group=choice(["", "", "x", "y"]),
            slots=choice([1, 2]),
            copies=choice([1, 1, 2]),
            keep_alive_s=choice([0, 0, 20]),
        )

    def part(self, name: str) -> None:
        self.present.discard(name)
        self.parting.add(name)
        self.tell(fx.ModelParts(name, "its owner says so"))

    def join(self) -> None:
        self.parting -= self.gone_models
        if free := [name for name in NAMES if name not in self.present | self.parting]:
            plan = self.plan(self.chance.choice(free))
            self.plans[plan.name] = plan
            self.present.add(plan.name)
            self.gone_models.discard(plan.name)
            self.tell(fx.ModelJoins(plan))

    def read(self) -> None:
        """What the reader of the GPUs sees: others' memory, and ours of some instances."""
        uuid = self.chance.choice(list(self.total))
        foreign = self.chance.choice([0, 0, 1, 3]) * GIB
        if self.held(uuid) + foreign <= self.total[uuid]:
            self.foreign[uuid] = foreign
            everybody = {**self.ready, **self.loading, **self.leaving}
            seen = {number: load.shares[uuid] for number, load in everybody.items() if uuid in load.shares}
            held = {number: share for number, share in seen.items() if self.chance.random() < 0.7}
            self.tell(fx.Reading(uuid, foreign, held))

    def settle_one(self) -> None:
        idle = [number for number in self.ready if number not in self.running.values()]
        if idle:
            number = self.chance.choice(idle)
            part = self.chance.choice([1.0, 0.8, 0.5])
            held = {uuid: int(share * part) for uuid, share in self.ready[number].shares.items()}
            self.ready[number] = msgspec.structs.replace(self.ready[number], shares=held)
            self.tell(fx.Settles(number, held))

    def step(self) -> None:
        chance, choice = self.chance.random(), self.chance.choice
        if chance < 0.3:
            self.job(choice(NAMES))
        elif chance < 0.4 and self.running:
            self.end(choice(list(self.running)))
        elif chance < 0.5 and self.loading:
            self.loaded(choice(list(self.loading)), "it broke" if self.chance.random() < 0.1 else "")
        elif chance < 0.6 and self.leaving:
            self.gone(choice(list(self.leaving)))
        elif chance < 0.68 and self.present:
            self.part(choice(sorted(self.present)))
        elif chance < 0.76:
            self.join()
        elif chance < 0.82:
            self.read()
        elif chance < 0.86:
            self.settle_one()
        elif chance < 0.9 and self.waiting:
            self.cancel(choice(sorted(self.waiting)))
        else:
            self.wait(choice([0.5, 3.0, 30.0]))

    def close(self) -> None:
        """Others let go of the GPUs, and what is pinned goes, so that everybody has a way; then all go."""
        for uuid in self.total:
            self.foreign[uuid] = 0
            self.tell(fx.Reading(uuid, 0))
        for name in sorted(name for name in self.present if self.plans[name].pin):
            self.part(name)
        self.finish(PATIENCE_S)
        for name in sorted(self.present):
            self.part(name)
        self.settle()


@pytest.mark.parametrize("seed", range(8))
def test_whoever_waits_is_answered_and_the_books_close_when_all_have_gone(seed: int) -> None:
    for number in range(ROUNDS):
        storm = Storm(random.Random(seed * ROUNDS + number))
        for _ in range(STEPS):
            storm.step()
        storm.close()
        assert not storm.ready
        assert not storm.scheduler.loaded()
        # All of a GPU is free by the books: a model that takes the whole of it is loaded at once.
        whole = storm.plans["whole"] = model("whole", 24)
        storm.tell(fx.ModelJoins(whole))
        storm.job("whole")
        assert [load.model for load in storm.loading.values()] == ["whole"], storm.scheduler.why()
