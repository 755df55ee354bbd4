"""Edits of several keys at once, against what whoever edits has seen."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from supervisor.config import load, masked, read
from supervisor.config_edit import NotThere, StaleEdit, edit, etag, patch
from supervisor.errors import ConfigError, NoPermission
from supervisor.worker_toml import WorkerToml

TEXT = '[limits]\nstall_s = 60 # a minute\n\n[engines.llm.env]\nHF_TOKEN = "hf_x"\n'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "worker.toml"
    path.write_text(TEXT)
    return path


def test_all_keys_or_none(path):
    edited = edit(path, {"limits.stall_s": None, "log.level": "debug", "limits.load_s": 5})
    settings = load(path, {})
    assert (settings.limits.stall_s, settings.limits.load_s, settings.log.level) == (120, 5, "debug")
    assert (edited.etag, edited.stronger) == (read(path).layers.etag, {})
    before = path.read_text()
    with pytest.raises(ConfigError) as caught:
        edit(path, {"log.level": "info", "limits.load_s": -1, "limits.start_s": "x"})
    assert [line.split(": ")[1] for line in caught.value.problems] == ["limits.load_s", "limits.start_s"]
    assert path.read_text() == before


def test_an_edit_of_what_has_changed_since_is_refused(path):
    seen = read(path).layers.etag
    after = edit(path, {"log.level": "debug"}, if_match=seen).etag
    assert after != seen
    with pytest.raises(StaleEdit, match="was changed since it was shown"):
        edit(path, {"log.level": "info"}, if_match=seen)
    assert load(path, {}).log.level == "debug"
    (path.parent / "conf.d").mkdir()
    (path.parent / "conf.d" / "a.toml").write_text("log.format = 'json'")
    with pytest.raises(StaleEdit):
        edit(path, {"log.level": "info"}, if_match=after)


def test_a_mask_never_becomes_a_secret(path):
    env = masked(load(path, {}))["engines"]["llm"]["env"]
    for key, value in (("engines.llm.env.HF_TOKEN", env["HF_TOKEN"]), ("engines.llm.env", env)):
        with pytest.raises(ConfigError, match="only stands for a secret"):
            edit(path, {key: value})
    edit(path, {"engines.llm.env.HF_TOKEN": "hf_y"})
    assert load(path, {}).engines["llm"].env == {"HF_TOKEN": "hf_y"}


@pytest.mark.parametrize("key", ["log.level", "engines.whisper.env.A", "limits.restart.healthy_s"])
def test_only_what_is_there_can_be_taken_out(path, key):
    with pytest.raises(NotThere, match=f"{key} is not in {path}"):
        edit(path, {key: None})


def test_tables_are_set_key_by_key(path):
    with pytest.raises(ConfigError, match="limits: is a table; set its keys one by one"):
        edit(path, {"limits": {"stall_s": 1}})
    edit(path, {"worker.labels": {"rack": "3"}})
    assert load(path, {}).worker.labels == {"rack": "3"}
    edit(path, {"limits": None})
    assert load(path, {}).limits.stall_s == 120


def test_what_has_no_effect_is_said(path, monkeypatch):
    monkeypatch.setenv("BULKHEAD__LOG__LEVEL", "error")
    assert edit(path, {"log.level": "info", "log.format": "json"}).stronger == {"log.level": "BULKHEAD__LOG__LEVEL"}


# ---- for programs


def test_patch_names_what_it_has_seen(path):
    seen = etag(path)
    assert seen == read(path).layers.etag
    after = patch(path, {"log.level": "debug", "limits.stall_s": None}, seen)
    assert after == etag(path) != seen
    with pytest.raises(StaleEdit):
        patch(path, {"log.level": "info"}, seen)
    assert (load(path, {}).log.level, load(path, {}).limits.stall_s) == ("debug", 120)
    assert patch(path, {"log.level": "info"}) == etag(path)


# ---- two at once


def test_no_edit_is_lost_when_many_edit_at_once(path):
    """Threads here, as every edit opens, reads and locks for itself; the next test has processes."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: edit(path, {f"worker.labels.n{number}": str(number)}), range(24)))
    assert load(path, {}).worker.labels == {f"n{number}": str(number) for number in range(24)}
    assert "# a minute" in path.read_text()


def test_two_commands_at_once_lose_nothing(path):
    commands = [
        [sys.executable, "-m", "supervisor", "config", "set", f"worker.labels.n{number}", "x", "--config", str(path)]
        for number in range(3)
    ]
    started = [subprocess.Popen(command) for command in commands]
    assert [process.wait(60) for process in started] == [0, 0, 0]
    assert sorted(load(path, {}).worker.labels) == ["n0", "n1", "n2"]


def test_an_edit_between_the_look_and_the_writing_is_stale(path, monkeypatch):
    seen, save = etag(path), WorkerToml.save

    def late(toml: WorkerToml) -> None:
        monkeypatch.setattr(WorkerToml, "save", save)
        edit(path, {"log.format": "json"})
        save(toml)

    monkeypatch.setattr(WorkerToml, "save", late)
    with pytest.raises(StaleEdit):
        patch(path, {"log.level": "info"}, seen)
    monkeypatch.setattr(WorkerToml, "save", late)
    patch(path, {"log.level": "error"})
    assert (load(path, {}).log.level, load(path, {}).log.format) == ("error", "json")


# ---- odd files


@pytest.mark.parametrize(
    ("text", "key", "value", "after"),
    [
        (b"[log]\r\nlevel = 'info' # c\r\n", "limits.load_s", 9, b"\r\n\r\n[limits]\r\nload_s = 9\r\n"),
        (b"[log]\nlevel = 'info'", "log.format", "json", b"'info'\nformat = \"json\"\n"),
        (b"limits.stall_s = 5 # five\n", "limits.load_s", 9, b"limits.stall_s = 5 # five\nlimits.load_s = 9\n"),
        (b"limits.stall_s = 5\n", "limits.stall_s", None, b""),
        (b"limits = { stall_s = 5 } # in\n", "limits.stall_s", 9, b"limits = { stall_s = 9 } # in\n"),
        (b'["limits"]\n"stall_s" = 5 # q\n', "limits.stall_s", 9, b'["limits"]\n"stall_s" = 9 # q\n'),
    ],
)
def test_layouts_stay(path, text, key, value, after):
    path.write_bytes(text)
    edit(path, {key: value})
    assert path.read_bytes().endswith(after)
    assert path.read_bytes().startswith(text[:6] if after else b"")
    assert path.read_bytes().count(b"#") == text.count(b"#")


@pytest.mark.parametrize(
    ("text", "key", "value", "sentence"),
    [
        (b"\xef\xbb\xbflog.level = 'info'", "log.level", "debug", "worker.toml:1: begins with a byte order mark"),
        (b"[log]\nlevel = '\xff'", "log.level", "debug", "worker.toml:2: column 10: is not UTF-8 text"),
        (b"[log]\n# \0\n", "log.level", "debug", "worker.toml:2: column 3: Found invalid character"),
        (b"limits = 3\n", "limits.stall_s", 5, "limits.stall_s has no place there; mend the file by hand"),
        (b"models = 3\n", "models.a.device", "cpu", 'there is no model "a"'),
        (b"", "worker.labels.a", "\udcff", "worker.labels.a: holds half a character"),
        (b"", "limits.stall_s", float("nan"), "limits.stall_s: nan is no setting"),
        (b"", "holds.applications.names", [None], "TOML has no NoneType"),
    ],
)
def test_what_cannot_be_edited_is_said_in_one_sentence(path, text, key, value, sentence):
    path.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        edit(path, {key: value})
    assert sentence in caught.value.problems[0]
    assert (len(caught.value.problems), path.read_bytes()) == (1, text)


def test_a_folder_and_a_loop_of_links(tmp_path):
    folder, loop = tmp_path / "folder", tmp_path / "loop"
    folder.mkdir()
    loop.symlink_to(loop)
    for odd in (folder, loop):
        with pytest.raises(ConfigError, match="cannot be read"):
            edit(odd, {"log.level": "info"})


def test_a_full_disk_leaves_the_old_file(path):
    """A limit on the size of files stands for the disk; the child has it, not this process."""
    before = path.read_bytes()
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (40, 40));"
        "from supervisor.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["config", "set", "worker.name", "box", "--config", str(path)]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 77
    assert "cannot be written: File too large; free some space there; the old content stands." in done.stderr
    assert (path.read_bytes(), sorted(os.listdir(path.parent))) == (before, ["worker.toml"])
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 40


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_closed_folder(path):  # pragma: no cover  the suite runs as root in containers
    path.parent.chmod(0o555)
    try:
        with pytest.raises(NoPermission, match="run this as its owner"):
            edit(path, {"log.level": "info"})
    finally:
        path.parent.chmod(0o755)


def test_a_file_that_may_only_be_read_keeps_its_mode(path):
    path.chmod(0o444)
    edit(path, {"log.level": "info"})
    assert path.stat().st_mode & 0o777 == 0o444


def test_a_secret_in_a_list_of_tables_is_not_overwritten_by_its_mask(path):
    with pytest.raises(ConfigError, match="only stands for a secret"):
        edit(path, {"engines.mine.options": {"servers": [{"key": "****"}]}})


def test_values_of_programs_are_what_json_has(path):
    value: Any = json.loads('{"argv": ["a", "{x}"], "args": {"x": "[0-9]+"}}')
    edit(path, {"engines.command.options": value})
    assert tomllib.loads(path.read_text())["engines"]["command"]["options"] == value
