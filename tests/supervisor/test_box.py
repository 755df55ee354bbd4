"""The machine around the host, as one life of the supervisor finds it."""

from __future__ import annotations

import json

import pytest

from supervisor.box import Box
from supervisor.host.cgroups import Cgroups
from supervisor.settings import Settings
from supervisor.state import hold_state


@pytest.fixture(autouse=True)
def stay(monkeypatch):
    """A real box may move its process into a cgroup of its own; a test must not."""
    monkeypatch.setattr(Cgroups, "find", lambda: None)


async def test_a_gpu_that_an_earlier_life_took_out_of_use_stays_out_of_use(tmp_path):
    with hold_state(tmp_path / "state") as state:
        state.gpus.write_text(json.dumps({"GPU-1": "Xid 79 (GPU has fallen off the bus)", "GPU-2": "process 7"}))
        box = Box(Settings(), state)
        assert "fallen off the bus" in box.health.usable("GPU-1")
        assert "process 7" in box.health.usable("GPU-2")
        assert set(json.loads(state.gpus.read_text())) == {"GPU-1", "GPU-2"}


async def test_a_damaged_note_about_gpus_costs_nothing_but_itself(tmp_path):
    with hold_state(tmp_path / "state") as state:
        state.gpus.write_bytes(b"\xff")
        assert Box(Settings(), state).health.usable("GPU-1") == ""
