"""What the owner orders, carried to those who act."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import pytest

from supervisor.control import asked
from supervisor.control.exchange import Refused
from supervisor.intake.holds import Mode, Source
from supervisor.orders import Orders, Parts
from supervisor.pausing import Pausing

GPUS = ["GPU-aaaa-1", "GPU-aaaa-2", "GPU-bbbb-3"]


class Models:
    """Notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[object, ...]] = []
        self.reason = self.user = ""

    def names(self) -> Sequence[str]:
        return ["chat", "owner/image"]

    def why_not(self, _model: str) -> str:
        return self.reason

    def users(self, _model: str) -> str:
        return self.user

    def load(self, model: str) -> str:
        self.asked.append(("load", model))
        return "It is being loaded."

    def unload(self, model: str, reason: str) -> str:
        self.asked.append(("unload", model, reason))
        return "It ends now."

    def restart(self, model: str, reason: str, *, now: bool) -> str:
        self.asked.append(("restart", model, reason, now))
        return "It is loaded anew now."


class Store:
    """Notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[object] = []

    async def _none(self) -> AsyncIterator[Mapping[str, Any] | None]:
        return
        yield

    def pull(self, order: asked.Pull) -> AsyncIterator[Mapping[str, Any] | None]:
        self.asked.append(order)
        return self._none()

    async def remove(self, order: asked.Remove) -> str:
        self.asked.append(order)
        return "It is gone."


class Running:
    """Two jobs."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def running(self) -> list[str]:
        return ["j-1", "j-2"]

    def cancel(self, job: str, reason: str) -> int:
        self.asked.append((job, reason))
        return 1 if job in self.running() else 0


@pytest.fixture
def pausing(tmp_path) -> Pausing:
    return Pausing(tmp_path / "holds.json", now=lambda: 100.0)


def made(pausing: Pausing, **parts: Any) -> Orders:
    return Orders(pausing, lambda *_asked: None, Parts(gpus=lambda: GPUS, **parts))


async def test_a_pause_is_a_hold_of_the_operators_and_resume_lifts_it(pausing):
    drained = []
    orders = Orders(pausing, lambda *asked: drained.append(asked))
    orders.pause("a game", for_s=60, free_vram=True)
    (hold,) = pausing.holds().items
    assert (hold.source, hold.reason, hold.until, hold.mode) == (Source.OPERATOR, "a game", 160.0, Mode.UNLOAD)
    orders.pause("", for_s=None, free_vram=False)
    (hold,) = pausing.holds().items
    assert (hold.until, hold.mode) == (None, Mode.STOP)
    assert orders.resume()
    assert not orders.resume()
    assert drained == []
    orders.drain("moving house", restart=False)
    orders.drain("an update", restart=True)
    assert drained == [("moving house", False), ("an update", True)]


# ---- holds of a scope


async def test_a_pause_of_a_kind_or_of_a_gpu_leaves_the_rest_alone(pausing):
    orders = made(pausing)
    orders.pause("", for_s=None, free_vram=False, kind="image")
    orders.pause("", for_s=None, free_vram=True, gpu="2")
    assert [(hold.kind, hold.gpu, hold.mode) for hold in pausing.holds().items] == [
        ("image", "", Mode.STOP),
        ("", GPUS[2], Mode.UNLOAD),
    ]
    assert pausing.reason() == "", "the worker as a whole goes on"
    assert not orders.resume(), "a resume without a scope lifts the pause of the whole worker, and there is none"
    assert orders.resume(kind="image")
    assert orders.resume(gpu=GPUS[2])
    assert pausing.holds().items == ()


@pytest.mark.parametrize(
    ("text", "meant"),
    [("GPU-aaaa-2", "GPU-aaaa-2"), ("0", "GPU-aaaa-1"), ("2", "GPU-bbbb-3"), ("gpu-b", "GPU-bbbb-3")],
)
async def test_a_gpu_is_meant_by_its_uuid_its_number_or_a_beginning(pausing, text, meant):
    orders = made(pausing)
    assert orders.cordon(text, asked.Cordon(reason="it is loud", for_s=5)).gpu == meant
    (hold,) = pausing.holds().items
    assert (hold.source, hold.gpu, hold.until, hold.mode) == (Source.OPERATOR, meant, 105.0, Mode.STOP)
    assert orders.uncordon(text)
    assert not orders.uncordon(text)


@pytest.mark.parametrize(
    "text", ["GPU-cccc", "3", "-1", "GPU-aaaa", "GPU", "..", "\0", "\u0663", "9" * 30, "x" * 10_000]
)
async def test_a_gpu_that_is_not_there_is_refused_with_those_that_are(pausing, text):
    orders = made(pausing)
    for order in (
        lambda: orders.cordon(text, asked.Cordon()),
        lambda: orders.uncordon(text),
        lambda: orders.pause("", for_s=None, free_vram=False, gpu=text),
    ):
        with pytest.raises(Refused) as refusal:
            order()
        assert refusal.value.status == 404
        assert all(uuid in str(refusal.value) for uuid in GPUS)
        assert len(str(refusal.value)) < 400
    assert pausing.holds().items == ()


async def test_a_cordon_can_be_lifted_when_its_gpu_is_gone(pausing):
    there = list(GPUS)
    orders = Orders(pausing, lambda *_asked: None, Parts(gpus=lambda: there))
    orders.cordon("GPU-bbbb-3", asked.Cordon(unload=True))
    there.clear()
    with pytest.raises(Refused, match="no GPU is known now"):
        orders.cordon("GPU-bbbb-3", asked.Cordon())
    assert orders.uncordon("GPU-bbbb-3")


async def test_holds_of_others_are_put_and_lifted_and_those_that_watch_the_machine_are_not(pausing):
    orders = made(pausing)
    hold = orders.put_hold(asked.PutHold(source=Source.UPDATE, mode="abort", reason="1.3", gpu="1"))
    assert (hold.source, hold.mode, hold.gpu) == (Source.UPDATE, Mode.ABORT, GPUS[1])
    assert not orders.lift_hold("update")
    assert orders.lift_hold("update", gpu="1")
    with pytest.raises(Refused, match="image alone cannot unload"):
        orders.put_hold(asked.PutHold(kind="image", mode="unload"))
    with pytest.raises(Refused, match=r"\[holds.foreign_vram\]") as refusal:
        orders.put_hold(asked.PutHold(source=Source.FOREIGN_VRAM))
    assert refusal.value.status == 409
    with pytest.raises(Refused, match=r"\[holds.schedule\]"):
        orders.lift_hold("schedule")
    with pytest.raises(Refused, match="there are operator, ") as refusal:
        orders.lift_hold("../weather")
    assert refusal.value.status == 404
    with pytest.raises(Refused, match="task kind 'painting'"):
        orders.put_hold(asked.PutHold(kind="painting"))


# ---- the supervisor's life


async def test_a_second_drain_that_wants_another_end_is_refused(pausing):
    drained: list[tuple[str, bool]] = []
    ending: list[bool] = []

    def drain(reason: str, restart: bool) -> None:
        drained.append((reason, restart))
        ending.append(restart)

    orders = Orders(pausing, drain, Parts(ending=lambda: ending[0] if ending else None))
    orders.drain("first", restart=False)
    orders.drain("again", restart=False)
    with pytest.raises(Refused, match="after which the supervisor ends") as refusal:
        orders.drain("other", restart=True)
    assert refusal.value.status == 409
    assert len(drained) == 2


async def test_a_shutdown_drains_and_hurries(pausing):
    done: list[str] = []
    orders = Orders(pausing, lambda reason, _restart: done.append(reason), Parts(hurry=lambda: done.append("now")))
    orders.shutdown("the power goes")
    assert done == ["the power goes", "now"]


async def test_a_level_that_there_is_not_is_refused(pausing):
    def level(name: str, _for_s: float | None) -> None:
        raise ValueError(f"level must be one of info, not {name!r}")

    with pytest.raises(Refused, match="one of info"):
        made(pausing, log_level=level).log_level("loud", None)


async def test_what_a_supervisor_does_not_have_is_refused_by_name(pausing):
    orders = made(pausing)
    for order in (
        lambda: orders.shutdown("x"),
        lambda: orders.load("chat"),
        lambda: orders.pull(asked.Pull(source="x")),
        lambda: orders.cancel_job("j", ""),
        lambda: orders.log_level("info", None),
    ):
        with pytest.raises(Refused, match="This supervisor cannot") as refusal:
            order()
        assert refusal.value.status == 409
    for wait in (orders.reload, lambda: orders.register(asked.Register(url="ws://c"))):
        with pytest.raises(Refused, match="without a file"):
            await wait()


# ---- models and jobs


async def test_models_are_meant_by_their_names_alone(pausing):
    models = Models()
    orders = made(pausing, engines=models)
    assert orders.load("owner/image") == "It is being loaded."
    assert orders.unload("chat", "") == "It ends now."
    assert orders.restart("chat", "stale", now=True)
    assert models.asked == [
        ("load", "owner/image"),
        ("unload", "chat", "the operator asked for it"),
        ("restart", "chat", "stale", True),
    ]
    for name in ("Chat", "../chat", "chat\0", "chat/", "", "x" * 5000):
        for order in (
            lambda name=name: orders.load(name),
            lambda name=name: orders.unload(name, ""),
            lambda name=name: orders.restart(name, "", now=False),
        ):
            with pytest.raises(Refused, match="there are chat, owner/image") as refusal:
                order()
            assert refusal.value.status == 404
            assert len(str(refusal.value)) < 300
    assert len(models.asked) == 3


async def test_what_cannot_be_loaded_says_why_and_is_not_asked(pausing):
    models = Models()
    models.reason = "it is in quarantine."
    orders = made(pausing, engines=models)
    for order in (lambda: orders.load("chat"), lambda: orders.restart("chat", "", now=True)):
        with pytest.raises(Refused, match="chat cannot be loaded now: it is in quarantine"):
            order()
    assert models.asked == []
    orders.unload("chat", "")
    assert models.asked == [("unload", "chat", "the operator asked for it")]


async def test_a_model_in_use_is_not_removed_and_who_uses_it_is_told(pausing):
    models, store = Models(), Store()
    orders = made(pausing, engines=models, pulls=store)
    models.user = "2 jobs run on it"
    with pytest.raises(Refused, match="chat is in use: 2 jobs run on it; unload it first") as refusal:
        await orders.remove(asked.Remove(name="chat"))
    assert refusal.value.status == 409
    assert store.asked == []
    assert await orders.remove(asked.Remove(name="not-served")) == "It is gone."
    models.user = ""
    await orders.remove(asked.Remove(name="chat"))
    assert [order.name for order in store.asked] == ["not-served", "chat"]


async def test_an_unknown_job_is_refused_with_those_that_run(pausing):
    jobs = Running()
    orders = made(pausing, jobs=jobs)
    assert orders.cancel_job("j-1", "") == 1
    assert jobs.asked == [("j-1", "the operator asked for it")]
    with pytest.raises(Refused, match="No job 'j-3' runs here; there are: j-1, j-2") as refusal:
        orders.cancel_job("j-3", "")
    assert refusal.value.status == 404
