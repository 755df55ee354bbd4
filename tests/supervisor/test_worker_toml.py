"""Edits of worker.toml keep what people wrote."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from supervisor.config import load
from supervisor.errors import ConfigError, NoPermission
from supervisor.worker_toml import FRESH, WorkerToml, _locked

PEOPLE = """\
# my box
config_version = 1   # do not touch

[engines.command]    # jobs of mine
device = "cpu"

# the toy
[[models]]
name = "synthetic-one"   # made up
engine = "synthetic"

[log]
level = "debug"  # noisy
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "worker.toml"
    path.write_text(PEOPLE)
    return path


def entry(name: str = "synthetic-two") -> dict[str, object]:
    return {"name": name, "engine": "synthetic", "options": {"slots": 1}}


def test_a_new_file_begins_with_defaults_and_is_valid(tmp_path: Path):
    path = tmp_path / "deep" / "worker.toml"
    toml = WorkerToml(path)
    toml.put_model(entry())
    toml.save()
    assert path.read_text().startswith(FRESH)
    assert [model.name for model in load(path).models] == ["synthetic-two"]
    assert "\n\n[[models]]" in path.read_text()


def test_comments_and_order_stay(file: Path):
    toml = WorkerToml(file)
    toml.put_model(entry(), comment="pulled\nfrom here")
    toml.save()
    text = file.read_text()
    for line in PEOPLE.splitlines():
        assert line in text
    assert "# pulled from here" in text
    assert [model["name"] for model in tomllib.loads(text)["models"]] == ["synthetic-one", "synthetic-two"]
    assert tomllib.loads(text)["log"] == {"level": "debug"}


def test_a_model_of_the_same_name_is_replaced_in_its_place(file: Path):
    toml = WorkerToml(file)
    toml.put_model(entry("synthetic-two"))
    toml.put_model({"name": "synthetic-one", "engine": "synthetic", "preload": True})
    toml.save()
    models = tomllib.loads(file.read_text())["models"]
    assert [model["name"] for model in models] == ["synthetic-one", "synthetic-two"]
    assert models[0]["preload"] is True
    assert "# noisy" in file.read_text()


def test_a_model_is_removed_and_the_rest_stays(file: Path):
    toml = WorkerToml(file)
    assert toml.has_model("synthetic-one")
    toml.remove_model("synthetic-one")
    toml.save()
    assert not WorkerToml(file).has_model("synthetic-one")
    assert "# noisy" in file.read_text()
    with pytest.raises(KeyError):
        WorkerToml(file).remove_model("synthetic-one")


@pytest.mark.parametrize("before", ["models = []\n", 'models = [{name = "synthetic-x", engine = "synthetic"}]\n'])
def test_inline_models_become_tables(tmp_path: Path, before: str):
    path = tmp_path / "worker.toml"
    path.write_text(before + "[log]\nlevel = 'info'\n")
    count = len(tomllib.loads(before)["models"])
    toml = WorkerToml(path)
    toml.put_model(entry())
    toml.save()
    assert len(load(path).models) == count + 1


def test_engine_keys_are_set_beside_the_others(file: Path):
    toml = WorkerToml(file)
    toml.set_engine("command", {"device": "auto"})
    toml.set_engine("whisper", {"device": "cpu", "env": {"A": "b"}})
    toml.save()
    engines = tomllib.loads(file.read_text())["engines"]
    assert engines == {"command": {"device": "auto"}, "whisper": {"device": "cpu", "env": {"A": "b"}}}
    assert "# jobs of mine" in file.read_text()


def test_engines_of_a_file_without_any(tmp_path: Path):
    toml = WorkerToml(tmp_path / "worker.toml")
    toml.set_engine("whisper", {"device": "cpu"})
    toml.save()
    assert load(tmp_path / "worker.toml").engines["whisper"].device == "cpu"


def test_a_result_that_is_not_valid_is_not_written(file: Path):
    toml = WorkerToml(file)
    toml.put_model({"name": "x", "engine": "lmm"})
    with pytest.raises(ConfigError, match=r"worker\.toml:\d+: models\[1\]"):
        toml.save()
    assert file.read_text() == PEOPLE
    assert os.listdir(file.parent) == ["worker.toml"]


def test_a_broken_file_is_not_edited(tmp_path: Path):
    path = tmp_path / "worker.toml"
    path.write_text("[[models]\n")
    with pytest.raises(ConfigError):
        WorkerToml(path)


def test_the_mode_of_the_file_stays_and_links_are_followed(file: Path, tmp_path: Path):
    file.chmod(0o640)
    link = tmp_path / "link.toml"
    link.symlink_to(file)
    toml = WorkerToml(link)
    toml.put_model(entry())
    toml.save()
    assert link.is_symlink()
    assert file.stat().st_mode & 0o777 == 0o640
    assert "synthetic-two" in file.read_text()


def test_an_unwritable_folder_is_told(tmp_path: Path, monkeypatch):
    toml = WorkerToml(tmp_path / "worker.toml")

    def denied(**_options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkstemp", denied)
    with pytest.raises(NoPermission, match="run this as its owner"):
        toml.save()


# ---- saving


def test_the_last_five_contents_are_kept(file: Path):
    file.chmod(0o640)
    contents = [file.read_text()]
    for number in range(7):
        toml = WorkerToml(file)
        toml.put(("limits", "stall_s"), 100 + number)
        toml.save()
        contents.append(file.read_text())
    kept = [file.with_name(f"worker.toml.bak{number}") for number in range(1, 6)]
    assert [path.read_text() for path in kept] == contents[-2:-7:-1]
    assert {path.stat().st_mode & 0o777 for path in kept} == {0o640}
    assert sorted(path.name for path in file.parent.iterdir()) == ["worker.toml", *(path.name for path in kept)]


def test_an_edit_that_changes_nothing_writes_nothing(file: Path):
    inode = file.stat().st_ino
    toml = WorkerToml(file)
    toml.put(("log", "level"), "debug")
    toml.save()
    assert file.stat().st_ino == inode
    assert [path.name for path in file.parent.iterdir()] == ["worker.toml"]


def test_an_edit_over_somebody_elses_is_refused(file: Path):
    first, second = WorkerToml(file), WorkerToml(file)
    first.put(("log", "level"), "info")
    first.save()
    second.put(("log", "format"), "json")
    with pytest.raises(ConfigError, match="was changed by another program meanwhile; nothing was written"):
        second.save()
    assert load(file).log.format == "text"
    first.put(("log", "format"), "json")
    first.save()
    assert load(file).log.format == "json"


def test_editors_wait_for_each_other(file: Path):
    with _locked(file.parent):
        child = subprocess.Popen(
            [sys.executable, "-m", "supervisor", "config", "set", "log.level", "info", "--config", str(file)]
        )
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(2)
        assert 'level = "debug"' in file.read_text()
    assert child.wait(60) == 0
    assert load(file).log.level == "info"


def test_a_link_stays_one(file: Path, tmp_path: Path):
    link = tmp_path / "etc" / "worker.toml"
    link.parent.mkdir()
    link.symlink_to(file)
    toml = WorkerToml(link)
    toml.put(("log", "level"), "info")
    toml.save()
    assert link.is_symlink()
    assert load(file).log.level == "info"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root edits other people's files")
def test_an_edit_by_root_leaves_a_file_its_owners(file: Path):
    os.chown(file, 12345, 12345)
    toml = WorkerToml(file)
    toml.put(("log", "level"), "info")
    toml.save()
    for path in (file, file.with_name("worker.toml.bak1")):
        assert (path.stat().st_uid, path.stat().st_gid) == (12345, 12345)


def test_values_at_any_depth(file: Path):
    toml = WorkerToml(file)
    toml.put(("limits", "restart", "quarantine_after"), 9)
    toml.put(("engines", "llm", "options", "n_ctx"), 8192)
    toml.put_model({"name": "deep", "engine": "command"})
    toml.put(("models", 1, "options", "argv"), ["x"])
    toml.put(("models", 1, "options", "args", "n"), "[0-9]+")
    toml.save()
    settings = load(file)
    assert settings.limits.restart.quarantine_after == 9
    assert settings.engines["llm"].options == {"n_ctx": 8192}
    assert settings.models[1].options == {"argv": ["x"], "args": {"n": "[0-9]+"}}
    toml.drop(("models", 1, "options", "args"))
    toml.drop(("limits", "restart"))
    toml.save()
    assert (load(file).models[1].options, load(file).limits.restart.quarantine_after) == ({"argv": ["x"]}, 5)
    with pytest.raises(KeyError):
        toml.drop(("limits", "restart", "quarantine_after"))
    with pytest.raises(KeyError):
        toml.drop(("log", "level", "x"))
