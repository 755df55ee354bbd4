"""What is declared of the load options is what the engines accept: the same names, and the same values of each."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from engines import catalog_options
from engines.catalog import CATALOG
from engines.catalog_options import OPTIONS, options_of
from engines.command.engine import Config as CommandConfig
from engines.diffusion.options import read_options as read_diffusion
from engines.embed.backend import read_options as read_embed
from engines.llm.backend import read_options as read_llm
from engines.piper import engine as piper
from engines.runtime.options import options_as
from engines.server.config import read as read_server
from engines.whisper import engine as whisper
from protocol.engine_wire import Model
from protocol.faults import FaultError

ROOT = Path(catalog_options.__file__).parent
ODD = "no-such-option"
# A file or folder that gets each engine as far as its options.
FILES = {
    "llm": ROOT / "llm" / "fixture" / "chat-q8_0.gguf",
    "whisper": ROOT / "whisper" / "fixture",
    "piper": ROOT / "piper" / "fixture",
    "image": ROOT / "image" / "fixture",
    "video": ROOT / "image" / "fixture",
}
BACKENDS = [(name, backend) for name, entry in CATALOG.items() for backend in entry.backends]


def model(options: dict[str, Any], engine: str = "", backend: str = "", path: Path | None = None) -> Model:
    files = {"model": str(path)} if path is not None else {}
    return Model(name="synthetic-x", files=files, device="cpu", backend=backend, options=options)


def test_every_engine_and_every_backend_is_declared():
    assert {name: len(entry.backends) for name, entry in CATALOG.items()} == {
        name: len(options) for name, options in OPTIONS.items()
    }


@pytest.mark.parametrize(("engine", "backend"), BACKENDS)
def test_the_names_are_those_that_the_engine_knows(engine, backend, tmp_path):
    made = importlib.import_module(CATALOG[engine].module).ENGINE()
    path = FILES.get(engine, tmp_path)
    if engine == "embed":
        path = tmp_path / "model"
        path.touch()
    pytest.importorskip("numpy")
    with pytest.raises(FaultError) as caught:
        made.load(model({ODD: 1}, engine, backend, path), tmp_path, lambda *_: None)
    known = re.search(r"known options: (.*)\.$", caught.value.fault.message)
    assert known is not None, caught.value.fault.message
    assert set(known[1].split(", ")) == set(options_of(engine, backend).__struct_fields__)


def llm(options: dict[str, Any], slots: int = 4) -> Any:
    return read_llm(model(options), SimpleNamespace(n_ctx_train=0), slots=slots)  # type: ignore[arg-type]


READERS: dict[type[catalog_options.Options], Callable[[dict[str, Any]], Any]] = {
    catalog_options.Llm: llm,
    catalog_options.LlmOneByOne: lambda options: llm(options, slots=1),
    catalog_options.Embed: lambda options: read_embed(model(options)),
    catalog_options.Image: lambda options: read_diffusion(model(options)),
    catalog_options.Video: lambda options: read_diffusion(model(options)),
    catalog_options.Command: lambda options: options_as(model({"argv": ["x"]} | options), CommandConfig),
    catalog_options.Server: lambda options: read_server(model({"url": "http://x"} | options)),
}
# Around every bound that is declared, and one of each type.
VALUES: list[Any] = [
    True,
    False,
    "",
    "x",
    "mean",
    "q8_0",
    1.5,
    ["x"],
    ["tools"],
    {},
    {"x": "y"},
    {"x": 1},
    {"chat": "/x"},
]
EDGES = (
    0,
    1,
    8,
    16,
    50,
    63,
    64,
    100,
    256,
    500,
    600,
    1024,
    2048,
    3600,
    4096,
    10_000,
    65_536,
    86_400,
    2**20,
    2**24,
    2**31,
)
VALUES += sorted({edge + step for edge in EDGES for step in (-1, 0, 1)})
# What the engine asks beyond type and range, and the declaration leaves to it.
BEYOND = {
    ("Server", "argv"),
    ("Server", "url"),
    ("Server", "cache_dir"),
    ("Command", "exit_codes"),
    ("Command", "env"),
    ("Command", "env_allow"),
}
FIELDS = [
    (table, name) for table in READERS for name in table.__struct_fields__ if (table.__name__, name) not in BEYOND
]


@pytest.mark.parametrize(("table", "name"), FIELDS, ids=lambda value: getattr(value, "__name__", value))
def test_an_option_has_the_values_that_the_engine_takes(table, name):
    required = {"argv": ["x"]} if table is catalog_options.Command else {}
    for value in VALUES:
        assert _takes(lambda value=value: msgspec.convert(required | {name: value}, table)) == _takes(
            lambda value=value: READERS[table]({name: value})
        ), (name, value)


def _takes(read: Callable[[], Any]) -> bool:
    try:
        read()
    except (FaultError, msgspec.ValidationError):
        return False
    return True


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        ("piper", {"slots": 0}),
        ("piper", {"slots": 65}),
        ("piper", {"voices": {"a": 1.5}}),
        ("whisper", {"max_audio_s": 0}),
        ("whisper", {"max_audio_s": 86_401}),
    ],
)
def test_what_is_refused_is_refused_by_the_engine(engine, options, tmp_path):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(options, options_of(engine))
    made = importlib.import_module(CATALOG[engine].module).ENGINE()
    with pytest.raises(FaultError) as caught:
        made.load(model(options, path=FILES[engine]), tmp_path, lambda *_: None)
    assert (caught.value.fault.field or "").startswith(f"options.{next(iter(options))}")


def test_types_of_engines_whose_library_comes_first():
    declared = {field.name: field.type for field in msgspec.structs.fields(catalog_options.Whisper)}
    assert declared["slots"] == whisper._Slots == piper._Slots == catalog_options._Slots
    assert declared["max_audio_s"] == whisper._Length


def test_any_backend_takes_what_one_of_them_takes():
    for engine, each in OPTIONS.items():
        names = {name for options in each for name in options.__struct_fields__}
        assert set(options_of(engine).__struct_fields__) == names
