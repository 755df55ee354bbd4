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
        ("max_queued = 0", "max_queued"),
        ("max_queued_per_tenant = 1.5", "max_queued_per_tenant"),
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


def test_where_files_lie_belongs_to_the_files_folder_unless_it_is_elsewhere(tmp_path: Path) -> None:
    file = tmp_path / "coordinator.toml"
    file.write_text('[blobs]\nurl = "s3://files/x"\nendpoint = "https://s3.example.org"\ncredentials = "keys"\n')
    config = load(file)
    assert (config.blobs.url, config.blobs.credentials) == ("s3://files/x", str(tmp_path / "keys"))
    file.write_text('[blobs]\nurl = "shared"\n[privacy]\nundelivered_s = 60\n')
    config = load(file)
    assert (config.blobs.url, config.privacy.undelivered_s) == (str(tmp_path / "shared"), 60)
    file.write_text('[blobs]\nsecret_key = "no"\n')
    with pytest.raises(Refusal, match="secret_key"):
        load(file)
