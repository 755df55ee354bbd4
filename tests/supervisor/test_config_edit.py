"""Edits of several keys at once, against what whoever edits has seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from supervisor.config import load, masked, read
from supervisor.config_edit import NotThere, StaleEdit, edit
from supervisor.errors import ConfigError

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
