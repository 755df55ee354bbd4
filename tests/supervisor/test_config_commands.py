"""`supervisor config …` as a person uses it."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest

from supervisor import config_commands
from supervisor.cli import main
from supervisor.config import load
from supervisor.config_edit import etag
from supervisor.errors import ExitCode

TEXT = """\
# my box
[limits]
stall_s = 60   # a minute

[[models]]
name = "synthetic-a"
engine = "synthetic"   # made up

[engines.llm]
env = { HF_TOKEN = "hf_x", LANG = "C" }
"""


class Box:
    """One worker.toml and the command over it."""

    def __init__(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.path = path
        self._capsys = capsys
        self.out = self.err = ""

    def run(self, *words: str) -> int:
        code = main(["config", *words, "--config", str(self.path)])
        self.out, self.err = self._capsys.readouterr()
        return code

    def json(self, *words: str) -> Any:
        assert self.run(*words, "--json") == 0
        return json.loads(self.out)


@pytest.fixture
def box(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Box:
    path = tmp_path / "worker.toml"
    path.write_text(TEXT)
    return Box(path, capsys)


# ---- reading


def test_origin_of_each_value(box, monkeypatch):
    monkeypatch.setenv("BULKHEAD__LOG__LEVEL", "debug")
    rows = {row["key"]: row for row in box.json("show", "--origin")}
    assert rows["limits.stall_s"] == {
        "key": "limits.stall_s", "value": 60.0, "source": "file", "place": f"{box.path}:3", "apply": "live",
    }  # fmt: skip
    assert rows["limits.load_s"]["source"] == "default"
    assert (rows["log.level"]["source"], rows["log.level"]["place"]) == ("env", "BULKHEAD__LOG__LEVEL")
    assert rows["models.synthetic-a.engine"]["place"] == f"{box.path}:7"
    assert rows["engines.llm.env.HF_TOKEN"]["value"] == "****"
    assert box.run("show", "--origin") == 0
    lines = {line.split(" = ")[0]: line for line in box.out.splitlines()}
    assert lines["limits.stall_s"].split() == ["limits.stall_s", "=", "60.0", "#", f"{box.path}:3"]
    assert lines["limits.load_s"].endswith("# default")
    assert "hf_x" not in box.out


def test_get(box):
    assert (box.run("get", "limits.stall_s"), box.out) == (0, "60.0\n")
    assert (box.run("get", "models.synthetic-a.engine"), box.out) == (0, "synthetic\n")
    assert (box.run("get", "models[0].preload"), box.out) == (0, "false\n")
    assert (box.run("get", "engines.llm.env.HF_TOKEN"), box.out) == (0, "****\n")
    assert box.run("get", "limits.restart") == 0
    assert tomllib.loads(box.out)["quarantine_after"] == 5
    assert box.json("get", "engines.llm.env")["LANG"] == "C"
    assert box.json("get", "models.synthetic-a.engine") == "synthetic"


def test_get_of_what_is_not_there(box):
    assert box.run("get", "limits.stal_s") == ExitCode.BAD_CONFIG
    assert 'unknown key (did you mean "stall_s"?)' in box.err
    assert box.run("get", "models.synthetic-a.keep_alive_s") == ExitCode.FAILED
    assert "is not set" in box.err
    assert box.run("get", "engines.llm.options.n_ctx") == ExitCode.FAILED


def test_path_lists_every_file(box, tmp_path):
    (tmp_path / "conf.d").mkdir()
    over = tmp_path / "conf.d" / "a.toml"
    over.write_text("")
    assert box.json("path")["files"] == [str(box.path), str(over)]
    assert (box.run("path"), box.out) == (0, f"{box.path}\n")


# ---- editing


def test_set_keeps_what_people_wrote(box):
    assert (box.run("set", "limits.stall_s", "300"), box.err) == (0, "")
    assert box.path.read_text() == TEXT.replace("stall_s = 60 ", "stall_s = 300 ")
    assert box.path.with_name("worker.toml.bak1").read_text() == TEXT
    assert box.run("set", "models.synthetic-a.device", "cpu") == 0
    assert box.run("set", "limits.restart.quarantine_after", "9") == 0
    assert box.run("set", "worker.labels.rack", "3") == 0
    settings = load(box.path, {})
    assert (settings.models[0].device, settings.limits.restart.quarantine_after) == ("cpu", 9)
    assert settings.worker.labels == {"rack": "3"}
    kept = box.path.read_text()
    assert all(line in kept for line in TEXT.replace("stall_s = 60 ", "stall_s = 300 ").splitlines())


def test_unset_gives_the_default_back(box):
    assert box.run("unset", "limits.stall_s") == 0
    assert load(box.path, {}).limits.stall_s == 120
    assert "# my box" in box.path.read_text()
    assert box.run("unset", "limits.stall_s") == ExitCode.FAILED
    assert f"limits.stall_s is not in {box.path}" in box.err
    assert box.run("unset", "models.synthetic-a") == 0
    assert load(box.path, {}).models == []
    assert box.run("unset", "log.lvel") == ExitCode.BAD_CONFIG


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("limits.stall_s", "soon"), "limits.stall_s: expected float, got str"),
        (("limits.stal_s", "1"), "limits.stal_s: unknown key"),
        (("models.synthetic-a.engine", "lmm"), 'there is no engine "lmm" (did you mean "llm"?)'),
        (("models.nobody.engine", "llm"), 'there is no model "nobody"'),
        (("coordinator.listen", "0.0.0.0:8080"), "keys would cross the network in the clear"),
    ],
)
def test_what_would_not_pass_the_check_is_refused(box, words, sentence):
    assert box.run("set", *words) == ExitCode.BAD_CONFIG
    assert sentence in box.err
    assert box.path.read_text() == TEXT
    assert [file.name for file in box.path.parent.iterdir()] == ["worker.toml"]


def test_a_mistake_can_be_mended(box):
    box.path.write_text(TEXT.replace("60 ", '"soon" '))
    assert box.run("set", "limits.stall_s", "60") == 0
    assert box.run("check") == 0


def test_set_in_a_new_file(box):
    box.path.unlink()
    assert box.run("set", "worker.name", "box-1") == 0
    assert load(box.path, {}).worker.name == "box-1"


def test_what_is_stronger_is_said(box, monkeypatch, tmp_path):
    (tmp_path / "conf.d").mkdir()
    over = tmp_path / "conf.d" / "a.toml"
    over.write_text('limits.stall_s = 5\n[[models]]\nname = "synthetic-b"\nengine = "synthetic"\n')
    assert box.run("set", "limits.stall_s", "300") == 0
    assert f"limits.stall_s is given in {over}:1 too, which is stronger" in box.err
    monkeypatch.setenv("BULKHEAD__LIMITS__STALL_S", "7")
    assert box.run("unset", "limits.stall_s") == 0
    assert "is given in BULKHEAD__LIMITS__STALL_S too" in box.err
    assert box.run("set", "models.synthetic-b.device", "cpu") == ExitCode.BAD_CONFIG
    assert f"this model is in {over}:2" in box.err


# ---- migrating, and the schema


def test_migrate_shows_first_and_writes_when_told(box, tmp_path):
    (tmp_path / "conf.d").mkdir()
    over = tmp_path / "conf.d" / "a.toml"
    over.write_text("config_version = 0\nlimits.drain_timeout_s = 9 # nine\n")
    old = f"config_version = 0\n{TEXT}"
    box.path.write_text(old)
    assert box.run("check") == 0
    assert f"{box.path}: config_version 0 is read as 1" in box.out
    assert len(box.json("check")["notes"]) == 2
    assert box.run("set", "limits.stall_s", "300") == ExitCode.BAD_CONFIG
    assert "first run: supervisor config migrate --write" in box.err

    assert box.run("migrate") == 0
    assert "-limits.drain_timeout_s = 9 # nine\n" in box.out
    assert "+limits.drain_s = 9 # nine\n" in box.out
    assert "nothing was written" in box.out
    assert (box.path.read_text(), over.with_name("a.toml.bak1").exists()) == (old, False)

    assert box.run("migrate", "--write") == 0
    assert box.path.read_text() == old.replace("= 0", "= 1", 1)
    assert over.read_text() == "config_version = 1\nlimits.drain_s = 9 # nine\n"
    assert over.with_name("a.toml.bak1").read_text().startswith("config_version = 0")
    assert (box.run("migrate"), box.out) == (0, f"{box.path}: nothing to migrate\n")


def test_migrate_writes_nothing_that_has_other_mistakes(box):
    box.path.write_text("config_version = 0\nnonsense = 1\n")
    assert box.run("migrate", "--write") == ExitCode.BAD_CONFIG
    assert box.path.read_text() == "config_version = 0\nnonsense = 1\n"


def test_the_schema_beside_the_file(box, tmp_path):
    for _ in range(2):
        assert box.run("schema", "--write") == 0
        assert box.path.read_text() == f"#:schema ./worker.schema.json\n{TEXT}"
    schema = json.loads((tmp_path / "worker.schema.json").read_text())
    assert "ModelTable" in schema["$defs"]


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["config", "--help"])
    assert ended.value.code == 0
    assert "supervisor config set limits.stall_s 300" in capsys.readouterr().out


# ---- check and help


GONE = '[[models]]\nname = "gone"\nengine = "llm"\npath = "gone.gguf"\n'


def test_a_missing_model_file_is_a_warning_and_with_strict_a_mistake(box):
    box.path.write_text(TEXT + GONE)
    assert box.run("check") == 0
    assert box.out == f"{box.path}: no mistakes, 1 warning\n"
    assert box.err.startswith(f"warning: {box.path}:14: models[1].path: there is no file or folder")
    found = box.json("check")
    assert (found["ok"], found["problems"], len(found["warnings"])) == (True, [], 1)
    assert box.run("check", "--strict") == ExitCode.BAD_CONFIG
    assert (box.out, "warning: " in box.err) == ("", True)
    assert box.run("check", "--strict", "--json") == ExitCode.BAD_CONFIG
    assert json.loads(box.out)["ok"] is False
    box.path.write_text(TEXT)
    assert (box.run("check", "--strict"), box.out) == (0, f"{box.path}: no mistakes\n")


@pytest.mark.parametrize("verb", ["", "check", "show", "get", "set", "unset", "migrate", "schema", "path"])
def test_every_help_has_examples_and_says_file(verb, capsys):
    with pytest.raises(SystemExit):
        main(["config", *([verb] if verb else []), "--help"])
    text = capsys.readouterr().out
    parser = argparse.ArgumentParser()
    config_commands.add_arguments(parser, argparse.ArgumentParser)
    assert f"\nexamples:\n  supervisor config {verb}".rstrip() in text
    if verb:
        assert "--config FILE" in text
    for line in re.findall(r"^  (supervisor config .*)$", text, re.MULTILINE):
        words = shlex.split(line.split("   ")[0].split(" > ")[0])
        parser.parse_args(words[2:])  # an example is one that the command line takes
        assert len(line) <= 78  # two cells stand before it


def test_what_a_change_takes_is_said(box):
    assert box.run("set", "limits.stall_s", "300") == 0
    assert box.out == "limits.stall_s: a supervisor that runs takes it up by itself\n"
    assert box.run("set", "worker.name", "box") == 0
    assert box.out == "worker.name: a supervisor that runs takes it up after: supervisor drain --restart\n"
    told = box.json("set", "models.synthetic-a.stall_s", "9")
    assert (told["apply"], told["stronger"], told["etag"]) == ("live", {}, etag(box.path))
    assert box.json("unset", "models.synthetic-a.stall_s")["apply"] == "live"
    assert box.json("set", "models[0].device", "cpu")["apply"] == "live"
    rows = {row["key"]: row["apply"] for row in box.json("show", "--origin")}
    assert (rows["worker.name"], rows["log.level"], rows["models.synthetic-a.stall_s"]) == ("restart", "live", "live")
