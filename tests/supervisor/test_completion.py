"""What shells offer after TAB: asked of the shells themselves, where they are installed."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from supervisor.cli import every_verb, main
from supervisor.completion import SHELLS, script, walk
from supervisor.verbs import VERBS


def test_the_walk_sees_every_verb():
    verbs = {verb.words: verb for verb in walk(every_verb())}
    assert [name for name, _ in verbs[()].below] == list(VERBS)
    assert {("gpus", "cordon"), ("models", "pull"), ("config", "set"), ("holds", "lift")} <= verbs.keys()
    states = next(option for option in verbs[("jobs",)].options if "--state" in option.names)
    assert "failed" in states.values
    config = next(option for option in verbs[("status",)].options if "--config" in option.names)
    assert (config.takes, config.file) == (True, True)
    watch = next(option for option in verbs[("status",)].options if "--watch" in option.names)
    assert not watch.takes
    assert verbs[("models", "pull")].files


@pytest.mark.parametrize("shell", SHELLS)
def test_the_command(shell, capsys):
    assert main(["completion", shell]) == 0
    assert capsys.readouterr().out == script(shell, every_verb())


CASES = [
    (["supervisor", "sta"], {"status"}),
    (["supervisor", "gpus", "c"], {"cordon"}),
    (["supervisor", "jobs", "--st"], {"--state"}),
    (["supervisor", "jobs", "--state", "fa"], {"failed"}),
    (["supervisor", "gpus", "--json", "cordon", "--un"], {"--unload"}),
    (["supervisor", "holds", "put", "foreign"], {"foreign-vram"}),
    (["supervisor", "completion", "f"], {"fish"}),
    (["supervisor", "status", "--config", "work"], {"worker.toml"}),
    (["supervisor", "models", "pull", "work"], {"worker.toml"}),
    (["supervisor", "jobs", "--model", "work"], set()),
    (["supervisor", "nonsense", "sta"], {"status"}),
]


def offered(shell: str, words: list[str], folder: object) -> set[str]:
    quoted = " ".join(f"'{word}'" for word in words)
    answer = "_supervisor; printf '%s\\n' \"${COMPREPLY[@]}\""
    asking = {
        "bash": f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; {answer}",
        "zsh": f"words=({quoted}); CURRENT={len(words)}; PREFIX='{words[-1]}'; _supervisor",
        "fish": f"complete -C '{' '.join(words)}' | string split -f1 \\t",
    }[shell]
    # Outside its line editor zsh has no completion: what it would offer is written instead, cut to what begins so.
    given = {
        "zsh": 'compdef() { :; }\ncompadd() { shift; for w in "$@"; do [[ $w == $PREFIX* ]] && print -r -- $w; done }\n'
        "_files() { print -rl -- $PREFIX*(N) }\n"
    }.get(shell, "")
    text = given + script(shell, every_verb()) + asking + "\n"
    argv = {"bash": ["bash", "--norc", "-s"], "zsh": ["zsh", "-f", "-s"], "fish": ["fish", "--no-config"]}[shell]
    ended = subprocess.run(argv, input=text, capture_output=True, text=True, timeout=60, check=False, cwd=str(folder))
    assert not ended.stderr, ended.stderr
    return {line for line in ended.stdout.splitlines() if line}


@pytest.mark.parametrize("shell", SHELLS)
def test_what_the_shell_offers(shell, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "worker.toml").touch()
    for words, expected in CASES:
        assert offered(shell, words, tmp_path) == expected, (shell, words)
