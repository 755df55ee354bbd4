"""What of app.py needs no processes; its life with real ones is in tests/system/test_road.py."""

from __future__ import annotations

import pytest

from supervisor import app
from supervisor.config import load
from supervisor.errors import ConfigError, ExitCode, GpuUnkillable, IdentityHeld, LinkRefused
from supervisor.link.dialects.native import NATIVE
from supervisor.link.session import SessionEnd, Why
from supervisor.settings import Settings
from supervisor.state import hold_state


@pytest.mark.parametrize(
    ("why", "type_", "code", "cure"),
    [
        (Why.REFUSED, LinkRefused, ExitCode.REFUSED, "check coordinator.token_file"),
        (Why.DELETED, LinkRefused, ExitCode.REFUSED, "register this worker again"),
        (Why.REVISION, LinkRefused, ExitCode.REFUSED, "update the older"),
        (Why.DUPLICATE, IdentityHeld, ExitCode.IDENTITY_HELD, "Another supervisor"),
    ],
)
def test_each_final_ending_of_the_link_has_its_exit_code_and_cure(why, type_, code, cure):
    error = app._refusal(SessionEnd(why, "the coordinator said no"), NATIVE.features)
    assert type(error) is type_
    assert error.exit_code == code
    assert cure in str(error)
    assert "the coordinator said no" in str(error)


def test_the_one_error_is_found_in_nested_groups():
    error = ConfigError(["x"])
    assert app._plain(ExceptionGroup("a", [ExceptionGroup("b", [error])])) is error
    two = ExceptionGroup("c", [error, ValueError()])
    assert app._plain(ExceptionGroup("a", [two])) is two


def test_a_mistake_of_ours_is_70_and_logged_whole(tmp_path, monkeypatch, capsys):
    async def broken(_self) -> ExitCode:
        raise ZeroDivisionError("unforeseen")

    monkeypatch.setattr(app._Supervisor, "live", broken)
    path = tmp_path / "worker.toml"
    path.write_text('[worker]\nstate_dir = "state"\n')
    assert app.run(load(path, {})) == ExitCode.INTERNAL
    assert "ZeroDivisionError: unforeseen" in capsys.readouterr().err


def test_an_error_with_an_exit_code_goes_on_to_the_command_line(tmp_path, monkeypatch):
    async def refused(_self) -> ExitCode:
        raise ExceptionGroup("nursery", [LinkRefused("no")])

    monkeypatch.setattr(app._Supervisor, "live", refused)
    path = tmp_path / "worker.toml"
    path.write_text('[worker]\nstate_dir = "state"\n')
    with pytest.raises(LinkRefused):
        app.run(load(path, {}))


async def test_a_box_without_hope_drains_and_ends_with_the_code_that_is_not_restarted(tmp_path):
    class Hopeless:
        def hopeless(self, _specs: object) -> str:
            return "No GPU is left."

    class Silent:
        def announce(self) -> None:
            pass

        look = announce

    with hold_state(tmp_path / "state") as state:
        supervisor = app._Supervisor(Settings(), state)
        supervisor._machine_changed(Hopeless(), Silent(), Silent())
        supervisor._machine_changed(Hopeless(), Silent(), Silent())
        assert supervisor._drain.asked.is_set()
        assert isinstance(supervisor._refused, GpuUnkillable)
        assert supervisor._refused.exit_code == ExitCode.GPU_UNKILLABLE
