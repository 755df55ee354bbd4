"""Options and kinds of arguments that verbs have in common."""

from __future__ import annotations

import argparse

import pytest

from supervisor.cli import main
from supervisor.control.commands.asking import add_common, add_verb, duration, positive, short


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("1d", 86_400), ("1h30m", 5400), ("0.5h", 1800)]
)
def test_a_length_of_time(text, seconds):
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "2", "h", "-2h", "2 h", "2w", "0s", "367d", "1e3s", "٣h30m2x", "9" * 400 + "d"])
def test_no_length_of_time(text):
    with pytest.raises(argparse.ArgumentTypeError):
        duration(text)


def test_a_wrong_command_line(capsys):
    with pytest.raises(SystemExit) as left:
        main(["pause", "--for", "soon"])
    assert left.value.code == 64
    assert "write 90s, 30m, 2h" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "x", "", "1000001", "٣"])
def test_no_number(text):
    with pytest.raises(argparse.ArgumentTypeError):
        positive(text)


def test_a_number():
    assert positive("12") == 12


def test_a_reason_that_nobody_would_read():
    assert short("x" * 200)
    with pytest.raises(argparse.ArgumentTypeError, match="has 201 characters"):
        short("x" * 201)


def test_an_option_counts_before_and_after_a_verb_below():
    """argparse lets the defaults of the lower parser overwrite what was said to the upper one."""
    parser = argparse.ArgumentParser()
    add_common(parser)
    add_verb(parser.add_subparsers(), "go", "go", lambda _: 0, "")
    for words in (["--json", "--config", "f", "go"], ["go", "--json", "--config", "f"]):
        seen = parser.parse_args(words)
        assert (seen.json, seen.config) == (True, "f")
    assert (parser.parse_args(["go"]).json, parser.parse_args([]).config) == (False, None)
