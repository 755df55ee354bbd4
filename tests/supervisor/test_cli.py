from __future__ import annotations

import json
import subprocess
import sys

import pytest

from supervisor.cli import main
from supervisor.errors import ExitCode


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
