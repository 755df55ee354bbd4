"""Requests and files that have killed these libraries. Each ends typed, the process lives, the next request works."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from protocol.engine_wire import Ready
from protocol.faults import Fault, Owner

pytestmark = pytest.mark.engine

MODEL = Path(__file__).parents[3] / "engines" / "llm" / "fixture" / "chat-q8_0.gguf"

GRAMMARS = {
    "open groups": "root ::= (((",
    "open class": "root ::= [",
    "open range": "root ::= [a-",
    "no root": 'x ::= "a"',
    "undefined rule": "root ::= missing",
    "left recursion": 'root ::= root "a"',
    "indirect left recursion": 'root ::= a "x"\na ::= root "y" | "z"',
    "empty": "",
    "blank": " \n",
    "NUL": 'root ::= "a\0"',
    "unknown token": "root ::= <think>",
    "too many repetitions": 'root ::= (("a"{2000}){2000}){2000}',
    "nested 90000 deep": "root ::= " + "(" * 90_000 + '"a"' + ")" * 90_000,
    "nested behind a comment": "root ::= # \r" + "(" * 90_000,
    "another library's language": '%llguidance {}\nstart: "a"',
    "not a grammar": "\u2603" * 1000,
    "10000 rules": 'root ::= "a"\n' + "\n".join(f'r{n} ::= "a"' for n in range(10_000)),
}

_DEEP: dict[str, Any] = {}
for _ in range(80):
    _DEEP = {"type": "object", "properties": {"a": _DEEP}}

SCHEMAS = {
    "unknown type": {"type": "nonsense"},
    "dangling reference": {"$ref": "#/nope"},
    "reference to itself": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    "remote reference": {"$ref": "https://example.com/schema.json"},
    "huge maxLength": {"type": "string", "maxLength": 10**9},
    "huge minItems": {"type": "array", "items": {"type": "string"}, "minItems": 10**6},
    "huge repetition": {"type": "string", "pattern": "^a{99999999}$"},
    "deep pattern": {"type": "string", "pattern": "^" + "(" * 90_000 + "a" + ")" * 90_000 + "$"},
    "broken pattern": {"type": "string", "pattern": "^[a$"},
    "properties of a number": {"type": "object", "properties": 3},
    "80 levels": _DEEP,
}


def user(text: str = "ping", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, **more}


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}

# params -> field that the refusal names
REQUESTS: dict[str, tuple[dict[str, Any], str]] = {
    "picture": (user([{"type": "image_url", "image_url": {"url": "x"}}]), "messages.0.content"),
    "content of null": ({"messages": [{"role": "user"}]}, "messages.0.content"),
    "tools with a plain prompt": ({"prompt": "x", "tools": [TOOL]}, "tools"),
    "schema with a plain prompt": ({"prompt": "x", "json_schema": {"type": "object"}}, "json_schema"),
    "tool without a name": (user(tools=[{"type": "function"}]), "tools.0"),
    "tool of unknown type": (user(tools=[{"type": "x", "function": {"name": "f"}}]), "tools.0"),
    "parameters of a tool": (
        user(tools=[{"type": "function", "function": {"name": "f", "parameters": 3}}]),
        "tools.0.function.parameters",
    ),
    "choice of an unknown tool": (
        user(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "g"}}),
        "tool_choice",
    ),
    "choice of nonsense": (user(tools=[TOOL], tool_choice="maybe"), "tool_choice"),
    "required without tools": (user(tool_choice="required"), "tool_choice"),
    "grammar beside tools": (user(tools=[TOOL], tool_choice="required", grammar='root ::= "a"'), "grammar"),
    "schema beside json_object": (user(json_schema={}, json_object=True), "json_schema"),
    "top_logprobs alone": (user(top_logprobs=3), "top_logprobs"),
    "token ids": ({"prompt": [1, 999_999]}, "prompt"),
    "temperature": (user(temperature=3), "temperature"),
    "max_tokens 0": (user(max_tokens=0), "max_tokens"),
    "empty stop": (user(stop=[""]), "stop[0]"),
    "misspelt option": (user(max_token=3), "max_token"),
    "NaN": ({**user(), "top_p": float("nan")}, "top_p"),
}


def well(child: Any) -> bool:
    content: str = child.run("llm", user()).body.content
    return content == "pong" and child.process.poll() is None


@pytest.mark.parametrize("name", GRAMMARS)
def test_a_malformed_grammar_is_the_callers_fault(chat: Any, name: str) -> None:
    answer = chat.run("llm", user(grammar=GRAMMARS[name]))
    assert (answer.fault.code, answer.fault.field) == ("invalid_parameter", "grammar")
    assert not answer.started
    assert well(chat)


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_bad_schema_is_the_callers_fault(chat: Any, name: str) -> None:
    answer = chat.run("llm", user(json_schema=SCHEMAS[name]))
    assert (answer.fault.code, answer.fault.field) == ("invalid_parameter", "json_schema")
    assert not answer.started
    assert well(chat)


@pytest.mark.parametrize("name", REQUESTS)
def test_a_bad_request_is_refused_by_field(chat: Any, name: str) -> None:
    params, field = REQUESTS[name]
    answer = chat.run("llm", params)
    assert answer.fault is not None
    assert answer.fault.owner is Owner.CALLER
    assert answer.fault.field == field
    assert not answer.started
    assert well(chat)


@pytest.mark.parametrize(
    "params",
    [
        {"prompt": "", "max_tokens": 3},
        user("", max_tokens=3),
        user("a\0b", max_tokens=3),
        user("\U0001f600" * 20, max_tokens=3),
        {"messages": [{"role": "assistant", "content": "1 2"}], "max_tokens": 3},
        user(grammar='root ::= "a"{0,2000}', max_tokens=30),
        user(grammar="root ::= \n", max_tokens=30),
        user(grammar="root ::= r0\n" + "\n".join(f"r{n} ::= r{n + 1}" for n in range(4000)) + '\nr4000 ::= "a"'),
        user(json_schema={"type": "string", "maxLength": 1000}, max_tokens=30),
        user(stop=["x" * 1000] * 16, max_tokens=3),
        user(chat_template_kwargs={"enable_thinking": False}, max_tokens=3),
    ],
    ids=str,
)
def test_odd_but_allowed(chat: Any, params: dict[str, Any]) -> None:
    assert chat.run("llm", params).fault is None
    assert well(chat)


# ---- files


def _flipped(seed: int) -> bytes:
    data = bytearray(MODEL.read_bytes())
    choose = random.Random(seed)
    for _ in range(8):  # in the header, where it hurts
        data[choose.randrange(24, 6000)] ^= 1 << choose.randrange(8)
    return bytes(data)


BROKEN: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "text": lambda: b"not a model\n" * 100,
    "zeros": lambda: bytes(5000),
    "bad magic": lambda: b"GGML" + MODEL.read_bytes()[4:],
    "version 99": lambda: b"GGUF" + (99).to_bytes(4, "little") + MODEL.read_bytes()[8:],
    "2^60 tensors": lambda: MODEL.read_bytes()[:8] + (2**60).to_bytes(8, "little") + MODEL.read_bytes()[16:],
    "header only": lambda: MODEL.read_bytes()[:40],
    "half the keys": lambda: MODEL.read_bytes()[:400],
    "half the data": lambda: MODEL.read_bytes()[:200_000],
    "a byte short": lambda: MODEL.read_bytes()[:-1],
    "key renamed": lambda: MODEL.read_bytes().replace(b"llama.block_count", b"llama.block_cOunt", 1),
    "architecture unknown": lambda: MODEL.read_bytes().replace(
        b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0lxama", 1
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_a_failed_load_and_the_process_lives(
    backend: str, spawn: Any, make_model: Any, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(BROKEN[name]())
    child = spawn("llm")
    fault = child.load(make_model(backend, path))
    assert isinstance(fault, Fault), fault
    assert fault.code == "load_failed"
    assert fault.message.endswith(".")
    assert "Error" not in fault.message
    assert child.process.poll() is None


@pytest.mark.parametrize("seed", range(6))
def test_flipped_bits_never_end_the_process(
    backend: str, spawn: Any, make_model: Any, tmp_path: Path, seed: int
) -> None:
    """llama.cpp has no checksum: such a file may load. Digests are the supervisor's; here the process must live."""
    path = tmp_path / "flipped.gguf"
    path.write_bytes(_flipped(seed))
    child = spawn("llm")
    end = child.load(make_model(backend, path))
    assert isinstance(end, Ready) or end.code == "load_failed", end
    assert child.process.poll() is None


def test_a_missing_file_is_named(backend: str, spawn: Any, make_model: Any, tmp_path: Path) -> None:
    fault = spawn("llm").load(make_model(backend, tmp_path / "none.gguf"))
    assert (fault.code, fault.field) == ("load_failed", "files.model")
    assert "none.gguf" in fault.message


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"n_ctx": 100_000_000}, "options.n_ctx"),
        ({"n_ctx": 513}, "options.n_ctx"),
        ({"n_ctx": -1}, "options.n_ctx"),
        ({"n_ctx": "many"}, "options.n_ctx"),
        ({"slots": 0}, "options.slots"),
        ({"slots": 1000}, "options.slots"),
        ({"n_gpu_layers": -2}, "options.n_gpu_layers"),
        ({"threads": -1}, "options.threads"),
        ({"cache_type": "q1"}, "options.cache_type"),
        ({"flash_attn": "maybe"}, "options.flash_attn"),
        ({"n_contex": 512}, "options.n_contex"),
    ],
)
def test_a_bad_load_option_is_refused_at_once(
    backend: str, spawn: Any, make_model: Any, options: dict[str, Any], field: str
) -> None:
    child = spawn("llm")
    fault = child.load(make_model(backend, MODEL, **options))
    assert (fault.code, fault.field) == ("load_failed", field)
    assert child.process.poll() is None
