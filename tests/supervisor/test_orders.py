"""What the owner orders, carried to those who act."""

from __future__ import annotations

from supervisor.intake.holds import Mode, Source
from supervisor.orders import Orders
from supervisor.pausing import Pausing


async def test_a_pause_is_a_hold_of_the_operators_and_resume_lifts_it(tmp_path):
    pausing, drained = Pausing(tmp_path / "holds.json", now=lambda: 100.0), []
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
