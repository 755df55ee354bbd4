"""A model folder is judged before native code reads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from engines.whisper import folder
from protocol.faults import FaultError
from tests.engines.whisper.conftest import MODEL


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def test_the_folder_or_the_file_in_it_may_be_named(model):
    assert folder.check(model) == folder.check(model / "model.bin") == model


@pytest.mark.parametrize("name", ["model.bin", "config.json", "tokenizer.json", "vocabulary.json"])
def test_a_missing_file_is_named(model, name):
    (model / name).unlink()
    with pytest.raises(FaultError, match=f"{name} is missing") as caught:
        folder.check(model)
    assert (caught.value.fault.code, caught.value.fault.field) == ("load_failed", "files.model")


def test_a_file_is_not_a_folder(model):
    with pytest.raises(FaultError, match="not the folder"):
        folder.check(model / "config.json")


def test_vocabulary_in_both_forms(model):
    assert folder.vocabulary_size(model) == 264 + 1501
    words = json.loads((model / "vocabulary.json").read_text())[:300]
    (model / "vocabulary.json").unlink()
    (model / "vocabulary.txt").write_text("".join(f"{word}\n" for word in words))
    assert folder.vocabulary_size(model) == 300


@pytest.mark.parametrize("text", ["{", '{"a": 1}'])
def test_a_broken_vocabulary_is_refused(model, text):
    (model / "vocabulary.json").write_text(text)
    with pytest.raises(FaultError, match=r"vocabulary\.json"):
        folder.vocabulary_size(model)


class Tokenizer:
    def __init__(self, vocabulary: dict[str, int]) -> None:
        self.get_vocab = lambda: vocabulary
        self.token_to_id = vocabulary.get


SPECIAL = {"<|endoftext|>": 1, "<|startoftranscript|>": 2, "<|startofprev|>": 3, "<|notimestamps|>": 4}


def test_the_tokenizer_must_fit_the_vocabulary():
    assert folder.check_tokenizer(Tokenizer(SPECIAL), 5) == range(1, 5)
    with pytest.raises(FaultError, match="knows token 4, but the model's vocabulary ends at 3"):
        folder.check_tokenizer(Tokenizer(SPECIAL), 4)


@pytest.mark.parametrize("name", SPECIAL)
def test_the_tokenizer_must_be_whispers(name):
    short = {token: number for token, number in SPECIAL.items() if token != name}
    with pytest.raises(FaultError, match="is not of a Whisper model"):
        folder.check_tokenizer(Tokenizer(short), 5)


def test_cublas_that_is_not_there_or_broken_is_left_to_the_warm_up(tmp_path, monkeypatch):
    folder.preload_cublas()
    place = tmp_path / "nvidia" / "cublas" / "lib"
    place.mkdir(parents=True)
    (place / "libcublas.so.12").write_bytes(b"not a library")
    monkeypatch.syspath_prepend(tmp_path)
    folder.preload_cublas()
