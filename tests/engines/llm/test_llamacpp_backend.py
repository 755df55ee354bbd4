"""What only this backend has: one slot, refusals of what the library cannot do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engines.llm.engine import LlmEngine
from engines.runtime.contract import CancelledRun, Job
from protocol.engine_wire import Ready
from protocol.work import LlmParams, Message

pytestmark = pytest.mark.engine
pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")


def test_more_slots_are_refused_with_the_cure(spawn: Any, make_model: Any) -> None:
    fault = spawn("llm").load(make_model("llama-cpp-python", slots=2))
    assert (fault.code, fault.field) == ("load_failed", "options.slots")
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


def test_cancel_in_the_prompt_is_seen_between_two_operations(tmp_path: Path, make_model: Any) -> None:
    """The abort callback ends llama_decode itself: no token is made, and the next run starts clean."""
    engine = LlmEngine()
    engine.load(make_model("llama-cpp-python"), tmp_path, lambda *_: None)
    params = LlmParams(prompt="x" * 400, max_tokens=5)
    job = Job("llm", params, report=lambda n, *_: reported.append(n))
    reported: list[int] = []
    job.cancelled.set()
    with pytest.raises(CancelledRun):
        engine.run(job)
    assert reported == [1]
    asked = LlmParams(messages=[Message(role="user", content="count to 3")], temperature=0)
    assert engine.run(Job("llm", asked)).body.content == "1 2 3"
