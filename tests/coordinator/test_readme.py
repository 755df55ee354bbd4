"""What coordinator/README.md tells operators to type and to write is what the programs take."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import msgspec
import pytest

from coordinator import config
from coordinator.cli import main as cli

README = Path(__file__).resolve().parents[2] / "coordinator" / "README.md"
TEXT = README.read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
# With the variables before it and the comment behind it taken away.
COMMANDS = [
    shlex.split(re.sub(r"^(\w+=\S+ )+", "", line), comments=True)
    for kind, block in BLOCKS
    for line in block.splitlines()
    if kind == "sh" and re.match(r"(\w+=\S+ )*coordinator ", line)
]
TABLES = [block for kind, block in BLOCKS if kind == "toml"]


@pytest.mark.parametrize("words", COMMANDS, ids=[f"{number}-{words[1]}" for number, words in enumerate(COMMANDS)])
def test_every_command_is_one_that_the_program_knows(words: list[str]) -> None:
    assert callable(cli._parser().parse_args(words[1:]).command)


def test_every_command_of_the_program_is_told_of() -> None:
    (commands,) = [action.choices for action in cli._parser()._subparsers._group_actions]  # type: ignore[union-attr]
    assert set(commands or ()) <= {words[1] for words in COMMANDS}


@pytest.mark.parametrize("number", range(len(TABLES)))
def test_every_configuration_is_read(number: int, tmp_path: Path) -> None:
    file = tmp_path / "coordinator.toml"
    file.write_text(TABLES[number])
    config.load(file)


def test_options_and_fields_in_the_text_are_real() -> None:
    known = set(config.Config.__struct_fields__)
    keys = ("store_pooled", "log_format", "log_level", "access_log", "drain_s", "max_queued", "max_queued_per_tenant")
    for key in keys:
        assert f"`{key}" in TEXT or f"\n{key} = " in TEXT
        assert key in known
    told = msgspec.convert(
        tomllib.loads('[otel]\nendpoint = "http://127.0.0.1:4318"\n[privacy]\nundelivered_s = 3600'), config.Config
    )
    assert told.privacy.undelivered_s == config.Privacy().undelivered_s  # "(an hour)"


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (README.parent / target).exists(), target


def test_it_stays_short() -> None:
    assert len(TEXT.splitlines()) <= 200
