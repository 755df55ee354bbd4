"""`coordinator deploy` and its sisters against a coordinator that serves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coordinator.cli.main import main
from coordinator.testing import Running

SOURCE = ["--source", "https://models.test/chat.gguf", "--sha256", "a" * 64]


@pytest.fixture
def how(served: Running, tmp_path: Path) -> list[str]:
    """Where to ask, and an admin's key."""
    key = tmp_path / "admin.key"
    key.write_text(served.coordinator.keys.create("admin") + "\n")
    return ["--url", served.url, "--key-file", str(key)]


def test_a_model_is_deployed_shown_and_given_up(how: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["deploy", "mine", *SOURCE, "--replicas", "2", "--on", "gpu=L40S", "--on", "room=cellar", *how]) == 0
    assert capsys.readouterr().out.startswith("mine: 0 of 2 ready, revision ")
    assert main(["deploy", "mine", "--replicas", "3", "--json", *how]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["wanted"], shown["on"]) == (3, {"gpu": "L40S", "room": "cellar"})
    assert main(["deploy", "mine", "--on", "any", "--options", '{"n_ctx": 512}', "--json", *how]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["on"], shown["options"]) == ({}, {"n_ctx": 512})
    assert main(["deployments", *how]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["MODEL", "REVISION", "WANTED", "READY"]
    assert row.split()[:1] == ["mine"]
    assert main(["undeploy", "mine", *how]) == 0
    assert "leaving" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["deploy", "none"], "source"),
        (["deploy", "mine", *SOURCE, "--on", "L40S"], "KEY=VALUE"),
        (["deploy", "mine", *SOURCE, "--options", "{"], "--options"),
        (["deploy", "mine", *SOURCE, "--replicas", "-1"], "replicas"),
        (["undeploy", "none"], "no deployment"),
        (["deployments", "none"], "no deployment"),
    ],
)
def test_mistakes_are_named(
    how: list[str], words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, *how]) == 1
    assert sentence in capsys.readouterr().err


def test_a_clients_key_is_told_what_it_takes(
    served: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = tmp_path / "client.key"
    key.write_text(served.coordinator.keys.create("client"))
    assert main(["deployments", "--url", served.url, "--key-file", str(key)]) == 1
    assert "--scope admin" in capsys.readouterr().err
