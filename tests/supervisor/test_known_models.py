"""The catalogue: the shipped list is sound, and a user's own list is read strictly and never written."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.catalog import CATALOG
from supervisor.errors import ConfigError
from supervisor.known_models import OWN, SHIPPED, known_models, near, read, search
from supervisor.pull_source import read_known

MINE = """\
["my-model"]
source = "./weights/my.gguf"
kind = "llm"
engine = "llm"
licence = "mine"
"""


@pytest.mark.parametrize("name", sorted(read(SHIPPED)))
def test_the_shipped_list_is_sound(name: str):
    known = read(SHIPPED)[name]
    request = read_known(name, known, "", "")
    assert request.kind == "hub"
    assert known.kind in CATALOG[known.engine].kinds
    assert known.licence
    assert known.about
    assert known.size_gb > 0
    assert known.vram_gb > known.size_gb * 0.9, "weights alone need as much"
    if known.sha256:
        assert len(known.revision) == 40, "a digest belongs to one commit"
        assert known.file


def test_without_an_own_catalogue_there_is_the_shipped_one(tmp_path: Path):
    assert known_models(tmp_path / "worker.toml") == read(SHIPPED)


def test_an_own_entry_comes_first_and_replaces_a_shipped_one(tmp_path: Path):
    (tmp_path / OWN).write_text(MINE + MINE.replace("my-model", "qwen3-4b"))
    found = known_models(tmp_path / "worker.toml")
    assert list(found)[:2] == ["my-model", "qwen3-4b"]
    assert found["qwen3-4b"].licence == "mine"
    assert found["my-model"].source == str(tmp_path / "weights/my.gguf"), "a path belongs to the catalogue's folder"
    assert len(found) == len(read(SHIPPED)) + 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[m", "catalogue.toml: "),
        ('[m]\nsource = "a/b"\nengine = "llm"\n', "catalogue.toml:1: m.kind: is missing"),
        (MINE + 'licens = "x"\n', 'catalogue.toml:6: my-model.licens: unknown key (did you mean "licence"?)'),
        (MINE.replace('"llm"\nlic', '"lmm"\nlic'), 'there is no engine "lmm" (did you mean "llm"?)'),
        (MINE.replace('kind = "llm"', 'kind = "image"'), "catalogue.toml:3: my-model.kind"),
        (MINE.replace("my-model", "../x"), "a name is letters, digits"),
        (MINE + 'sha256 = "abc"\n', "catalogue.toml:6: my-model.sha256"),
    ],
)
def test_mistakes_are_named_with_their_line(tmp_path: Path, text: str, said: str):
    (tmp_path / OWN).write_text(text)
    with pytest.raises(ConfigError) as caught:
        known_models(tmp_path / "worker.toml")
    assert said in str(caught.value)
    assert (tmp_path / OWN).read_text() == text


def test_bytes_that_are_no_text_are_told(tmp_path: Path):
    (tmp_path / OWN).write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        known_models(tmp_path / "worker.toml")


def test_every_word_must_be_found():
    known = read(SHIPPED)
    assert set(search(known, [])) == set(known)
    assert set(search(known, ["German"])) == {"voice-de-thorsten"}
    assert set(search(known, ["audio_stt", "tiny"])) == {"whisper-tiny"}
    assert search(known, ["audio_stt", "German"]) == {}


def test_a_misspelt_name_is_near_one():
    assert near(read(SHIPPED), "quen3-4b") == "qwen3-4b"
    assert near(read(SHIPPED), "xyz") == ""
