"""What users name when they pull."""

from __future__ import annotations

import pytest

from supervisor.known_models import Known
from supervisor.pull_source import (
    PullError,
    default_name,
    folder_name,
    plain_source,
    read_known,
    read_source,
    unknown_word,
)
from supervisor.pull_wire import Request

DIGEST = "ab" * 32


@pytest.mark.parametrize(
    ("source", "kind", "what", "file"),
    [
        ("owner/repo", "hub", "owner/repo", ""),
        ("hf:owner/repo:sub/m.gguf", "hub", "owner/repo", "sub/m.gguf"),
        ("owner/repo@v1.0:Q4_K_M", "hub", "owner/repo@v1.0", "Q4_K_M"),
        ("https://huggingface.co/owner/repo", "hub", "owner/repo", ""),
        ("https://huggingface.co/owner/repo/blob/main/a/m.gguf?x=1", "hub", "owner/repo@main", "a/m.gguf"),
        ("https://huggingface.co/owner/repo/resolve/abc/m.gguf", "hub", "owner/repo@abc", "m.gguf"),
        ("https://host/m.gguf", "url", "https://host/m.gguf", ""),
    ],
)
def test_sources(source: str, kind: str, what: str, file: str):
    found = read_source(source, "", "")
    assert (found.kind, found.source, found.file) == (kind, what, file)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("owner/Repo-GGUF", "Repo-GGUF"),
        ("owner/repo:a/My Model.Q4_K_M.gguf", "My-Model.Q4_K_M"),
        ("owner/repo:Q4_K_M", "repo"),
        ("https://host/x/m-00001-of-00003.gguf?key=1", "m"),
        ("https://host/", "host"),
    ],
)
def test_names_come_from_the_source(source: str, name: str):
    assert default_name(read_source(source, "", "")) == name


def test_names_become_folders():
    assert folder_name("org/my model") == "org--my--model"
    with pytest.raises(PullError):
        folder_name("..")


@pytest.mark.parametrize("name", [".store", ".pulling-x", ".hidden"])
def test_no_name_becomes_a_folder_of_the_stores_own(name: str):
    assert not folder_name(name).startswith(".")


def known(**fields: object) -> Known:
    return Known(**{"source": "owner/repo", "kind": "llm", "engine": "llm", **fields})  # type: ignore[arg-type]


def test_a_known_model_is_its_repository_at_its_revision():
    found = read_known("m", known(file="m.gguf", revision="abc", sha256=DIGEST.upper()), "", "")
    assert (found.kind, found.source, found.file, found.sha256) == ("hub", "owner/repo@abc", "m.gguf", DIGEST)
    assert found.said_by == "the catalogue"


def test_the_command_line_is_stronger_than_the_catalogue():
    found = read_known("m", known(file="m.gguf", sha256=DIGEST), "other.gguf", "")
    assert (found.file, found.sha256) == ("other.gguf", ""), "another file has another digest"
    found = read_known("m", known(file="m.gguf", sha256=DIGEST), "", "cd" * 32)
    assert (found.sha256, found.said_by) == ("cd" * 32, "--sha256")


def test_a_catalogue_with_a_source_that_is_none_names_the_model():
    with pytest.raises(PullError, match=r"^m: its source in the catalogue: .*not encrypted"):
        read_known("m", known(source="http://models.example/m.gguf"), "", "")


def test_secrets_of_a_url_are_left_out():
    request = Request(kind="url", source="https://user:pw@host/m.gguf?key=1", staging="")
    assert plain_source(request) == "https://host/m.gguf"
    assert plain_source(Request(kind="hub", source="o/r@v?x", staging="")) == "o/r@v?x"


def test_a_word_that_is_nothing_gets_a_hint():
    names = {"qwen3-4b": known()}
    assert "qwen3-4b" in unknown_word("qwen3-4", names)
    assert "models search" in unknown_word("zzz", names)
    assert unknown_word("./absent", names) == ""
