"""engine-probe --sandbox: the table of layers, and the layer that breaks an engine."""

from __future__ import annotations

import json
import sys

import pytest

from supervisor.host.containment import backend
from supervisor.host.grants import LAYERS
from supervisor.host.work import EngineSpec, Sandbox
from supervisor.probe import engine_spec, main, probe_engine
from supervisor.probe_sandbox import find_guilty, render
from supervisor.probe_verdict import Probe
from supervisor.settings import EngineTable

ENGINE = EngineSpec(name="e", module="none", python="none")
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the layers are Linux's")


@pytest.mark.parametrize(
    ("cured_by", "sentence"),
    [
        ({("landlock",)}, "without landlock"),
        ({("seccomp",)}, "without seccomp"),
        ({LAYERS}, "several"),
        (set(), "not the cause"),
    ],
)
async def test_the_guilty_layer_is_named(cured_by, sentence):
    async def again(engine: EngineSpec) -> Probe:
        verdict = "ok" if engine.sandbox.without in cured_by else "failed"
        return Probe(engine="e", backend="", device_requested="cpu", verdict=verdict)

    assert sentence in await find_guilty(ENGINE, again)


@LINUX
async def test_a_real_engine_tells_what_holds_around_it():
    probe = await probe_engine("synthetic", engine_spec("synthetic", EngineTable()), "", "cpu")
    assert probe.ok, probe
    assert probe.sandbox["privileges"] == "verified"
    assert "verified" in render([probe], [""])


@LINUX
async def test_off_is_off_and_still_on_a_leash():
    probe = await probe_engine("synthetic", engine_spec("synthetic", EngineTable(sandbox="off")), "", "cpu")
    assert probe.ok, probe
    assert (probe.sandbox["warden"], probe.sandbox["seccomp"], probe.sandbox["pid"]) == ("claimed", "off", "off")


@LINUX
async def test_the_real_server_engine_cannot_do_without_its_network():
    """A wrong profile, found by taking layers away: connecting is refused by seccomp and, without it, by the rest."""
    engine = engine_spec("server", EngineTable(network="none"))
    assert engine.sandbox == Sandbox(network="none")
    # With its network it answers within a second; without, it waits for its server until it is ended.
    assert not (await probe_engine("server", engine, "", "cpu", deadline_s=8)).ok


def test_layers_of_other_systems_have_their_columns():
    found = {"seatbelt": "verified", "warden": "claimed"}
    probe = Probe(
        engine="e", backend="", device_requested="cpu", verdict="ok", sandbox=found, platform="macos", python=""
    )
    text = render([probe], [""])
    assert text.splitlines()[0] == "platform: macos"
    assert text.splitlines()[1].split() == ["engine", "backend", "warden", "seatbelt"]


def test_from_the_command_line(capsys, monkeypatch):
    assert main(["synthetic", "--device", "cpu", "--sandbox"]) == 0
    assert "landlock" in capsys.readouterr().out
    monkeypatch.setattr(type(backend()), "facts", lambda _self: {"platform": "wsl2"})
    monkeypatch.setattr(type(backend()), "verdicts", lambda _self: {"job": "claimed", "warden": "off"})
    assert main(["synthetic", "--device", "cpu", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["platform"] == "wsl2"
    assert found["sandbox"]["job"] == "claimed"
    assert found["sandbox"]["warden"] == "claimed"  # what was found by trying counts for more
