"""Prompts to ids: padded to length, refused when too long, the same from both tokenizer layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from protocol.faults import FaultError

pytest.importorskip("tokenizers", reason="the image extra is not installed")
pytest.importorskip("numpy", reason="the image extra is not installed")
tokens = pytest.importorskip("engines.diffusion.tokens")

pytestmark = pytest.mark.engine


def test_a_prompt_is_framed_and_padded(folder: Path) -> None:
    found = tokens.PromptTokens(folder / "tokenizer")
    vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    begin, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    ids = found.ids("A  Red\ncircle", "prompt")
    assert ids[:5] == [begin, vocabulary["a</w>"], vocabulary["red</w>"], vocabulary["circle</w>"], end]
    assert ids[5:] == [end] * 72


@pytest.mark.parametrize("text", ["a red circle", "", "Hello, wörld! 42 it's", "日本語 🙂", "\x00 \ud7ff"])
def test_both_layouts_of_the_tokenizer_agree(folder: Path, text: str) -> None:
    whole = tokens.PromptTokens(folder / "tokenizer").ids(text, "prompt")
    (folder / "tokenizer" / "tokenizer.json").unlink()
    assert tokens.PromptTokens(folder / "tokenizer").ids(text, "prompt") == whole


def test_75_tokens_fit_and_76_are_refused_by_name(folder: Path) -> None:
    found = tokens.PromptTokens(folder / "tokenizer")
    assert len(found.ids("red " * 75, "prompt")) == 77
    with pytest.raises(FaultError) as caught:
        found.ids("red " * 76, "negative_prompt")
    fault = caught.value.fault
    assert (fault.code, fault.field) == ("context_length_exceeded", "negative_prompt")
    assert fault.detail == {"tokens": 76, "limit": 75}


def test_a_fixed_graph_length_wins(folder: Path) -> None:
    assert len(tokens.PromptTokens(folder / "tokenizer", 16).ids("red", "prompt")) == 16


def test_an_unset_length_means_clips(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps({"model_max_length": 10**30, "pad_token": {"content": "!"}}))
    ids = tokens.PromptTokens(folder / "tokenizer").ids("red", "prompt")
    assert len(ids) == 77
    assert ids[-1] == json.loads((folder / "tokenizer" / "vocab.json").read_text())["!"]


def test_truncation_in_the_file_is_not_obeyed(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps({**json.loads(path.read_text()), "truncation": truncation}))
    with pytest.raises(FaultError, match="76 tokens"):
        tokens.PromptTokens(folder / "tokenizer").ids("red " * 76, "prompt")


@pytest.mark.parametrize("content", [b"", b"{}", b"\x00\xff", b'{"model": 1}'])
def test_a_broken_tokenizer_is_a_failed_load(folder: Path, content: bytes) -> None:
    (folder / "tokenizer" / "tokenizer.json").write_bytes(content)
    with pytest.raises(FaultError) as caught:
        tokens.PromptTokens(folder / "tokenizer")
    assert caught.value.fault.code == "load_failed"


def test_no_tokenizer_files_are_named(folder: Path) -> None:
    for name in ("tokenizer.json", "merges.txt"):
        (folder / "tokenizer" / name).unlink()
    with pytest.raises(FaultError, match=r"vocab\.json"):
        tokens.PromptTokens(folder / "tokenizer")


def test_a_special_token_that_is_not_there_is_named(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer_config.json").write_text('{"bos_token": "<nowhere>"}')
    with pytest.raises(FaultError, match="<nowhere>"):
        tokens.PromptTokens(folder / "tokenizer")
