"""coordinator.toml and the command line."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from coordinator.config import Config, load, merged, state_dir
from coordinator.server import Refusal


def test_the_command_line_wins(tmp_path: Path) -> None:
    path = tmp_path / "coordinator.toml"
    path.write_text('config_version = 1\nlisten = "127.0.0.1:1"\nstate = "st"\ntls_cert = "/abs/c.pem"\ndrain_s = 5\n')
    config = load(path)
    assert (config.state, config.tls_cert, config.drain_s) == (str(tmp_path / "st"), "/abs/c.pem", 5)
    given = argparse.Namespace(listen="127.0.0.1:2", state=None, other="x")
    assert merged(config, given).listen == "127.0.0.1:2"
    assert merged(config, given).state == str(tmp_path / "st")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("listne = 'x'", "listne"),
        ("drain_s = 'x'", "drain_s"),
        ("drain_s = 0", "drain_s"),
        ("= 1", "line 1"),
        ("config_version = 2", "config_version 2"),
    ],
)
def test_a_bad_file_is_refused_with_its_name(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "coordinator.toml"
    path.write_text(text)
    with pytest.raises(Refusal, match=words) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="No such file"):
        load(tmp_path / "none.toml")
    assert load(None) == Config()


def test_the_default_state_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    assert state_dir(Config(state="/s")) == Path("/s")
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/bulkhead:/x")
    assert state_dir(Config()) == Path("/var/lib/bulkhead")
    monkeypatch.delenv("STATE_DIRECTORY")
    monkeypatch.setenv("XDG_STATE_HOME", "/home/u/st")
    assert state_dir(Config()) == Path("/home/u/st/bulkhead/coordinator")
