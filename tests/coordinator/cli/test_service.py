"""`coordinator service`, with somebody else in systemd's place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from coordinator.cli import service as cli_service
from coordinator.cli.main import main
from coordinator.server import Refusal
from coordinator.service import MARK, ServicePlan, unit


class Systemd:
    """Remembers what it was told."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.told: list[str] = []

    def __call__(self, words: Sequence[str]) -> int:
        self.told.append(" ".join(words))
        return self.code


def test_install_and_uninstall(tmp_path: Path) -> None:
    systemd, place = Systemd(), tmp_path / "it.service"
    text = unit(ServicePlan(python="/opt/python"))
    for _ in range(2):
        assert cli_service.installed(text, place, systemd) == 0
    assert place.read_text() == text
    assert systemd.told[:3] == ["daemon-reload", "enable it.service", "restart it.service"]
    assert cli_service.uninstalled(place, systemd) == 0
    assert not place.exists()
    assert systemd.told[-2:] == ["disable --now it.service", "daemon-reload"]
    assert cli_service.uninstalled(place, systemd) == 0


def test_what_does_not_start_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_service.installed(MARK, tmp_path / "it.service", Systemd(1)) == 1
    assert "journalctl -u it.service" in capsys.readouterr().err


def test_somebody_elses_unit_stays(tmp_path: Path) -> None:
    place = tmp_path / "it.service"
    place.write_text("[Unit]\n")
    with pytest.raises(Refusal, match="written by somebody else"):
        cli_service.installed(MARK, place, Systemd())
    with pytest.raises(Refusal, match="written by somebody else"):
        cli_service.uninstalled(place, Systemd())
    assert place.read_text() == "[Unit]\n"


def test_the_unit_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_service, "unreachable", lambda _: "")
    config, key = tmp_path / "c.toml", tmp_path / "k"
    config.write_text('listen = "127.0.0.1:443"\ndrain_s = 100\n')
    key.touch()
    assert main(["service", "install", "--print", "--config", str(config), "--credential", f"tls.key={key}"]) == 0
    text = capsys.readouterr().out
    assert f"LoadCredential=tls.key:{key}" in text
    assert "TimeoutStopSec=115" in text
    assert "CAP_NET_BIND_SERVICE" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--credential", "nothing"), "Expected NAME=FILE"),
        (("--credential", "coordinator.toml=/etc/hosts"), "give it with --config"),
        (("--environment-file", "/nowhere/at/all"), "There is no such file"),
    ],
)
def test_what_cannot_be_is_refused(
    arguments: Sequence[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_service, "unreachable", lambda _: "")
    assert main(["service", "install", "--print", *arguments]) == 78
    assert words in capsys.readouterr().err


def test_an_unreachable_program_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_service, "unreachable", lambda _: "/root")
    assert main(["service", "install", "--print"]) == 78
    assert "cannot pass /root" in capsys.readouterr().err
