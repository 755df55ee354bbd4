from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from engines.llm.grammar import MAX_DEPTH, MAX_RULES, NativeParser, bracket_depth, check_grammar
from protocol.faults import FaultError


def never(_grammar: bytes) -> bool:
    raise AssertionError("the native parser must not see this grammar")


def always(_grammar: bytes) -> bool:
    return True


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  \n",
        'root ::= "\0"',
        "root ::= " + "(" * (MAX_DEPTH + 1),
        "root ::= # comment\r" + "(" * (MAX_DEPTH + 1),
        'root ::= "a" [b"] ' + "(" * (MAX_DEPTH + 1),
        'root ::= "\\"" ' + "(" * (MAX_DEPTH + 1),
        "x ::= y\n" * (MAX_RULES + 1),
    ],
    ids=lambda text: repr(text[:30]),
)
def test_refused_before_the_native_parser(text: str) -> None:
    with pytest.raises(FaultError) as caught:
        check_grammar(text, never, "tools")
    assert (caught.value.fault.code, caught.value.fault.field) == ("invalid_parameter", "tools")


@pytest.mark.parametrize("wrap", ['"{}"', "[{}]", "# {}\n"])
def test_brackets_that_do_not_nest_do_not_count(wrap: str) -> None:
    check_grammar("root ::= " + wrap.format("(" * 10_000), always)


def test_what_the_parser_refuses_is_refused() -> None:
    with pytest.raises(FaultError, match="cannot parse it as GBNF"):
        check_grammar("root ::= x", lambda _: False)


@pytest.mark.parametrize(("text", "depth"), [("", 0), ("()()", 1), ("((a)(b(c)))", 3), (")))((", 2)])
def test_bracket_depth(text: str, depth: int) -> None:
    assert bracket_depth(text) == depth


def library(name: str) -> Any:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    if name == "xllamacpp":
        from engines.runtime import xllama

        return xllama.native_library()
    import llama_cpp

    return llama_cpp.llama_cpp._lib


@pytest.mark.engine
@pytest.mark.parametrize("name", ["xllamacpp", "llama_cpp"])
def test_the_native_parser_survives_the_deepest_grammar_that_we_let_through(name: str) -> None:
    parses = NativeParser(library(name))
    deepest = "root ::= " + "(" * MAX_DEPTH + '"a"' + ")" * MAX_DEPTH
    check_grammar(deepest, parses)
    chain = (
        "root ::= r0\n" + "\n".join(f"r{n} ::= r{n + 1}" for n in range(MAX_RULES - 2)) + f'\nr{MAX_RULES - 2} ::= "a"'
    )
    check_grammar(chain, parses)
    assert not parses(b"root ::= (((")
