"""What only this backend has: one slot, refusals of what the library cannot do."""

from __future__ import annotations

from typing import Any

import pytest

from protocol.engine_wire import Ready

pytestmark = pytest.mark.engine
pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")


def test_more_slots_are_refused_with_the_cure(spawn: Any, make_model: Any) -> None:
    fault = spawn("llm").load(make_model("llama-cpp-python", n_parallel=2))
    assert (fault.code, fault.field) == ("load_failed", "options.n_parallel")
    assert "xllamacpp" in fault.message


def test_a_template_that_does_not_compile_is_a_failed_load(spawn: Any, make_model: Any) -> None:
    fault = spawn("llm").load(make_model("llama-cpp-python", chat_template="{% for %}"))
    assert (fault.code, fault.field) == ("load_failed", "options.chat_template")


def test_a_template_of_the_operator_is_used_and_may_refuse(spawn: Any, make_model: Any) -> None:
    template = (
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}"
        "{{ bos_token }}<|user|>count to 3<|end|><|assistant|>"
    )
    child = spawn("llm")
    assert isinstance(child.load(make_model("llama-cpp-python", chat_template=template)), Ready)
    user = {"role": "user", "content": "hello"}
    assert child.run("llm", {"messages": [user], "temperature": 0}).body.content == "1 2 3"
    fault = child.run("llm", {"messages": [{**user, "role": "system"}]}).fault
    assert (fault.code, fault.field) == ("invalid_parameter", "messages")
    assert "begin with the user" in fault.message


def test_nothing_is_lost_on_stderr_while_it_loads(spawn: Any, make_model: Any) -> None:
    """`verbose=False` would point descriptor 2 at /dev/null; a crash would then leave no words."""
    child = spawn("llm")
    child.load(make_model("llama-cpp-python"))
    child.run("llm", {"prompt": "x", "grammar": "root ::= ("})
    assert "error parsing grammar" in child.stderr()
