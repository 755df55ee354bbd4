from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from supervisor.cli import every_verb, main
from supervisor.completion import walk
from supervisor.errors import ConfigError, ExitCode, IdentityHeld, NoPermission, SupervisorError
from supervisor.verbs import VERBS


def run(*words: str, cwd=None, **environ: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(cwd or "/nonexistent"), **environ}
    argv = [sys.executable, "-m", "supervisor", *words]
    return subprocess.run(argv, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


def test_all_errors_of_a_configuration_on_stderr_and_exit_78(tmp_path):
    (tmp_path / "worker.toml").write_text('[limits]\ndrain_s = 0\n[[models]]\nname = "x"\nengine = "lmm"\n')
    ended = run("run", "--config", "worker.toml", cwd=tmp_path)
    assert ended.returncode == ExitCode.BAD_CONFIG
    assert ended.stderr == (
        "worker.toml:2: limits.drain_s: expected float > 0.0\n"
        'worker.toml:5: models[0].engine: there is no engine "lmm" (did you mean "llm"?)\n'
    )
    assert ended.stdout == ""


def test_a_wrong_command_line_is_64_and_version_is_quick(tmp_path):
    assert run("frobnicate", cwd=tmp_path).returncode == ExitCode.USAGE
    assert run("run", "--frob", cwd=tmp_path).returncode == ExitCode.USAGE
    assert run("config", "frob", cwd=tmp_path).returncode == ExitCode.USAGE
    version = run("version", cwd=tmp_path)
    assert (version.returncode, version.stdout[:11]) == (0, "supervisor ")


def test_cheap_commands_do_not_import_the_loop():
    code = (
        "import sys; from supervisor.cli import main; main(['version']); "
        "sys.exit(any(name in sys.modules for name in ('trio', 'httpx', 'msgspec')))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, timeout=60).returncode == 0


@pytest.mark.parametrize("words", [[], ["run"], ["config"], ["config", "check"], ["models"]])
def test_help_shows_examples(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "usage: supervisor" in shown
    if len(words) < 2:
        assert "examples:" in shown


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "worker.toml"
    path.write_text('[[models]]\nname = "synthetic"\nengine = "synthetic"\n')
    return path


def test_check(config, capsys):
    assert main(["config", "check", "--config", str(config)]) == 0
    assert "no mistakes" in capsys.readouterr().out
    config.write_text("nonsense = 1")
    assert main(["config", "check", "--config", str(config)]) == ExitCode.BAD_CONFIG
    assert f"{config}:1: nonsense: unknown key" in capsys.readouterr().err
    assert main(["config", "check", "--json", "--config", str(config)]) == ExitCode.BAD_CONFIG
    report = json.loads(capsys.readouterr().out)
    assert (report["ok"], len(report["problems"])) == (False, 1)


def test_show_is_a_configuration_again(config, capsys, tmp_path):
    assert main(["config", "show", "--json", "--config", str(config)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["limits"]["drain_s"], shown["models"][0]["name"]) == (60.0, "synthetic")
    assert main(["config", "show", "--config", str(config)]) == 0
    (tmp_path / "again.toml").write_text(capsys.readouterr().out)
    assert main(["config", "check", "--config", str(tmp_path / "again.toml")]) == 0


def test_schema_and_path(config, capsys, monkeypatch, tmp_path):
    assert main(["config", "schema"]) == 0
    assert "CoordinatorTable" in json.loads(capsys.readouterr().out)["$defs"]
    monkeypatch.setenv("BULKHEAD_CONFIG", str(config))
    assert main(["config", "path"]) == 0
    assert capsys.readouterr().out.strip() == str(config)
    monkeypatch.setenv("BULKHEAD_CONFIG", str(tmp_path / "gone.toml"))
    assert main(["config", "path"]) == ExitCode.BAD_CONFIG
    assert "no such file" in capsys.readouterr().err


# ---- all verbs

BELOW = [
    verb.words for verb in walk(every_verb()) if verb.words and verb.words[0] in ("engines", "gpus", "holds", "models")
]


@pytest.mark.parametrize("words", [[name] for name in VERBS] + [list(words) for words in BELOW if len(words) > 1])
def test_every_verb_has_help_with_two_examples(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    examples = shown.partition("examples:\n")[2].splitlines()
    assert len([line for line in examples if line.startswith("  ") and "supervisor" in line]) >= 2, shown


def test_help_of_all_verbs_fits_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stats"], "there is no command 'stats'; did you mean 'status'?"),
        (["drian"], "there is no command 'drian'; did you mean 'drain'?"),
        (["gpus", "cordn", "1"], "there is no command 'cordn'; did you mean 'cordon'?"),
        (["models", "pul"], "there is no command 'pul'; did you mean 'pull'?"),
        (["config", "chek"], "there is no command 'chek'; did you mean 'check'?"),
        (["xyzzy"], "there is no command 'xyzzy'; there are run, status, "),
        (["jobs", "--state", "failled"], "there is no --state 'failled'; did you mean 'failed'?"),
        (["holds", "put", "updat"], "did you mean 'update'?"),
        (["pause", "--for", "soon"], "write 90s, 30m, 2h"),
        (["log-level"], "the following arguments are required: level"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_a_wrong_command_line_says_what_was_meant(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == ExitCode.USAGE
    assert said in capsys.readouterr().err


ASKING = [
    ["status"],
    ["jobs"],
    ["jobs", "x"],
    ["jobs", "cancel", "x"],
    ["engines"],
    ["engines", "restart", "x"],
    ["gpus"],
    ["gpus", "cordon", "0"],
    ["holds"],
    ["holds", "lift", "update"],
    ["pause"],
    ["resume"],
    ["drain"],
    ["drain", "--wait"],
    ["shutdown"],
    ["logs"],
    ["logs", "-f"],
    ["events"],
    ["models", "load", "x"],
    ["models", "unload", "x"],
    ["reload"],
    ["log-level", "info"],
    ["register", "wss://c", "--token-file", "t"],
    ["ui"],
]


@pytest.mark.parametrize("words", ASKING)
def test_exit_codes_without_a_supervisor(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "worker.toml").write_text('[control]\nsocket = "none.sock"\n')
    assert main([*words, "--config", "worker.toml"]) == ExitCode.NOT_RUNNING
    assert "`supervisor run`" in capsys.readouterr().err
    assert main([*words, "--config", "none.toml"]) == ExitCode.BAD_CONFIG
    assert "none.toml: no such file" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["worker.toml"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError(["worker.toml:1: wrong"]), 78),
        (NoPermission("no"), 77),
        (IdentityHeld("two"), 73),
        (KeyboardInterrupt(), 130),
        (SupervisorError("ours"), 70),
    ],
)
def test_exit_codes_of_what_goes_wrong(error, code, monkeypatch, capsys):
    def fail(_arguments: object) -> int:
        raise error

    monkeypatch.setattr("supervisor.cli._version", fail)
    assert main(["version"]) == code
    assert "Traceback" not in capsys.readouterr().err


def test_a_pipe_that_nobody_reads(tmp_path):
    """`supervisor completion zsh | head -1` ends quietly."""
    argv = f"{sys.executable} -m supervisor completion zsh; echo code=$? >&2"
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = subprocess.run(["sh", "-c", argv], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    finally:
        os.close(writer)
    assert ended.stderr == "code=1\n"


def test_ctrl_c_ends_with_130(tmp_path):
    """As a shell would see it, in the middle of an answer that does not come."""
    (tmp_path / "worker.toml").write_text('[control]\nsocket = "mute.sock"\n')
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(tmp_path / "mute.sock"))
        mute.listen()
        argv = [sys.executable, "-m", "supervisor", "status", "--config", str(tmp_path / "worker.toml")]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as asking:
            mute.settimeout(30)
            caller, _ = mute.accept()
            with caller:
                caller.settimeout(30)
                caller.recv(1000)
                asking.send_signal(signal.SIGINT)
                out, err = asking.communicate(timeout=30)
    assert (asking.returncode, out, err) == (130, "", "")


def test_examples_fit_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    for name in VERBS:
        with pytest.raises(SystemExit):
            main([name, "--help"])
        examples = capsys.readouterr().out.partition("examples:\n")[2].splitlines()
        if VERBS[name].examples:  # the others have theirs elsewhere
            assert max(map(len, examples)) <= 80, examples
