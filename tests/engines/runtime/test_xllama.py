"""The typed file around xllamacpp. What runs a model is tested through the engines; here are its edges."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from engines.runtime import xllama
from protocol.faults import FaultError


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (
            {"type": "exceed_context_size_error", "message": "m", "n_ctx": 5, "n_prompt_tokens": 6},
            "context_length_exceeded",
        ),
        ({"type": "invalid_request_error", "message": "m"}, "invalid_request"),
        ({"type": "not_supported_error", "message": "m"}, "unsupported"),
        ({"type": "server_error", "message": "m"}, "engine_failed"),
        ({"type": "new in some later version"}, "engine_failed"),
        ("text", "engine_failed"),
    ],
)
def test_error_bodies_become_faults(error: Any, code: str) -> None:
    fault = xllama.fault_of_error(error).fault
    assert fault.code == code
    assert fault.message.endswith(".")
    if code == "context_length_exceeded":
        assert fault.detail == {"n_ctx": 5, "n_prompt_tokens": 6}


def test_a_socket_left_by_an_earlier_life_is_removed(tmp_path: Path) -> None:
    (tmp_path / "x.sock").touch()
    assert xllama._socket_path(tmp_path) == str(tmp_path / "x.sock")
    assert not (tmp_path / "x.sock").exists()


def test_a_long_path_becomes_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    monkeypatch.chdir(deep)
    assert xllama._socket_path(deep) == "./x.sock"


def test_a_path_too_long_from_everywhere_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FaultError, match="shorter state_dir"):
        xllama._socket_path(deep)


@pytest.mark.engine
def test_names_of_the_log_functions_are_still_there() -> None:
    """They are C++ names of the wheel: when a new wheel loses them, failed loads lose their reasons."""
    pytest.importorskip("xllamacpp")
    library = xllama.native_library()
    for name in (xllama._LOG_MAIN, xllama._LOG_FILE, xllama._LOG_FLUSH, xllama._LOG_LEVEL):
        assert getattr(library, name)


@pytest.mark.engine
@pytest.mark.parametrize("name", ["_LOG_MAIN", "_LOG_FILE", "_LOG_FLUSH", "_LOG_LEVEL"])
def test_a_load_log_without_those_names_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pytest.importorskip("xllamacpp")
    monkeypatch.setattr(xllama, name, "no_such_function")
    with xllama._LoadLog(tmp_path / "log") as log:
        assert log.text() == ""
    assert os.listdir(tmp_path) == []


@pytest.mark.engine
def test_versions_and_claims() -> None:
    pytest.importorskip("xllamacpp")
    assert xllama.version()
    assert "cpu" in xllama.claimed_devices()
