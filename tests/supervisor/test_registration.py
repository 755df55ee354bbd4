"""A coordinator is tried and written down, or nothing is changed at all."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest
import trio

from protocol import link_wire as wire
from supervisor.config import load
from supervisor.control.asked import Register
from supervisor.control.exchange import Refused
from supervisor.registration import register
from supervisor.testing import FakeCoordinator, open_coordinator


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "worker.toml"
    path.write_text('# mine\n[worker]\nstate_dir = "state"\n')
    return path


async def ask(config: Path, order: Register, **more: Any) -> dict[str, Any]:
    state = config.parent / "state"
    with trio.fail_after(30):
        return await register(order, config=config, state=state, name="box", **{"environ": {}, **more})


async def welcomed(coordinator: FakeCoordinator, found: list[object]) -> None:
    peer = await (await coordinator.connection()).welcome()
    hello = peer.hello
    found.extend([peer.headers["authorization"], hello.worker, hello.capabilities.accepting, hello.capabilities.models])


async def refused(config: Path, order: Register, **more: Any) -> Refused:
    """The refusal, after which nothing has changed."""
    before = config.read_bytes()
    with pytest.raises(Refused) as refusal:
        await ask(config, order, **more)
    assert config.read_bytes() == before
    assert not (config.parent / "state" / "coordinator-token").exists()
    return refusal.value


async def test_a_coordinator_that_welcomes_us_is_written_down(config):
    found: list[object] = []
    async with open_coordinator() as coordinator, trio.open_nursery() as nursery:
        nursery.start_soon(welcomed, coordinator, found)
        told = await ask(config, Register(url=coordinator.url, token="t0ken\n"))
        assert found == ["Bearer t0ken", "box", False, ()], "it offers nothing"
        settings = load(config, {})
        assert settings.coordinator.url == coordinator.url
        file = Path(settings.coordinator.token_file)
        assert file.read_text() == "t0ken\n"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert config.read_text().startswith("# mine\n")
        assert (told["checked"], told["restart"], told["token_file"]) == (True, True, str(file))
        assert "t0ken" not in str(told)


async def test_a_coordinator_that_refuses_the_token_changes_nothing(config):
    async def turn_away(coordinator: FakeCoordinator) -> None:
        peer = await coordinator.connection()
        await peer.expect(wire.Hello)
        await peer.close(wire.CLOSE_AUTH, "no such token")

    async with open_coordinator() as coordinator, trio.open_nursery() as nursery:
        nursery.start_soon(turn_away, coordinator)
        refusal = await refused(config, Register(url=coordinator.url, token="wrong"))
    assert refusal.status == 409
    assert "the token is not good there" in str(refusal)
    assert "wrong" not in str(refusal)


async def test_a_place_where_nobody_is_changes_nothing(config):
    with trio.socket.socket() as deaf:
        await deaf.bind(("127.0.0.1", 0))
        url = f"ws://127.0.0.1:{deaf.getsockname()[1]}"
        assert "does not let this worker in" in str(await refused(config, Register(url=url, token="t0ken")))
        told = await ask(config, Register(url=url, token="t0ken", check=False))
    assert told["checked"] is False
    assert load(config, {}).coordinator.url == url


async def test_a_coordinator_that_says_nothing_is_left_in_time(config):
    async with open_coordinator() as coordinator:
        await refused(config, Register(url=coordinator.url, token="t0ken"), connect_s=0.3)


async def test_the_one_that_we_are_connected_to_is_not_disturbed(config):
    """A second session of the same worker would end the first."""
    url = "ws://127.0.0.1:9/base"
    told = await ask(config, Register(url=url + "/", token="t0ken"), connected=lambda: url)
    assert told["checked"] is False


async def test_a_token_file_of_the_owners_is_named_and_not_copied(config, tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("t0ken")
    mine.chmod(0o600)
    order = Register(url="ws://127.0.0.1:9", token_file=str(mine), check=False)
    assert (await ask(config, order))["token_file"] == str(mine)
    assert load(config, {}).coordinator.token_file == str(mine)
    assert not (tmp_path / "state" / "coordinator-token").exists()
    mine.chmod(0o644)
    assert "chmod 600" in str(await refused(config, order))


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({}, "coordinator-token"),
        ({"token": "a", "token_file": "/b"}, "not both"),
        ({"token": " \n"}, "no token has"),
        ({"token": "a\nX-Evil: 1"}, "no token has"),
        ({"token": "a\0"}, "no token has"),
        ({"token_file": "relative"}, "absolute"),
        ({"token_file": "/nowhere/at/all"}, "cannot be read"),
    ],
)
async def test_a_token_that_is_none(config, fields, word):
    assert word in str(await refused(config, Register(url="ws://127.0.0.1:9", **fields)))


async def test_trust_that_cannot_be_read(config):
    order = Register(url="wss://127.0.0.1:9", token="t", tls_ca="/nowhere.pem")
    assert "tls_ca" in str(await refused(config, order))


async def test_a_configuration_that_would_be_wrong_is_left_as_it_was(config):
    """The token that was there before comes back as well."""
    state = config.parent / "state"
    state.mkdir()
    (state / "coordinator-token").write_text("old\n")
    config.write_text('[worker]\nstate_dir = "state"\nnmae = "x"\n')
    before = config.read_bytes()
    with pytest.raises(Refused, match="left as it was"):
        await ask(config, Register(url="ws://127.0.0.1:9", token="new", check=False))
    assert config.read_bytes() == before
    assert (state / "coordinator-token").read_text() == "old\n"


async def test_a_variable_that_is_stronger_is_told(config, monkeypatch):
    monkeypatch.setenv("BULKHEAD__COORDINATOR__URL", "ws://127.0.0.1:8")
    told = await ask(config, Register(url="ws://127.0.0.1:9", token="t", check=False))
    assert "BULKHEAD__COORDINATOR__URL" in told["message"]
