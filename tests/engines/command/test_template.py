"""One item stays one item, whatever the caller sends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.command import template
from protocol.faults import FaultError

_VALUES = st.one_of(st.text(), st.integers(), st.booleans(), st.floats(allow_nan=False, allow_infinity=False))


def test_places_are_parts_or_wholes_of_an_item():
    items = template.parse(["prog", "--size={width}x{height}", "{name}", "{{literal}}", ""])
    assert template.places(items) == {"width", "height", "name"}
    values = {"width": 3, "height": 4.5, "name": "a b; $(c) 'q'"}
    assert template.render(items, values.__getitem__) == ["prog", "--size=3x4.5", "a b; $(c) 'q'", "{literal}", ""]


def test_booleans_read_as_programs_expect():
    assert template.render(template.parse(["p", "{a}", "{b}"]), {"a": True, "b": False}.__getitem__)[1:] == [
        "true",
        "false",
    ]


def test_inputs_config_and_folder_are_places():
    items = template.parse(["p", "{input:audio}", "{config}", "{folder}/out"])
    assert template.places(items) == {"input:audio", "config", "folder"}


@pytest.mark.parametrize(
    "text", ["{", "}", "a{b", "{a b}", "{}", "{1a}", "{a:b}", "{{a}", "{input:}", "{a!r}", "{a.b}"]
)
def test_a_stray_brace_is_a_failed_load(text):
    with pytest.raises(FaultError, match="item 1") as caught:
        template.parse(["prog", text])
    assert caught.value.fault.field == "options.argv"


@pytest.mark.parametrize("argv", [[], [""], ["{program}"], ["/bin/{program}", "x"]])
def test_the_program_itself_is_the_operators(argv):
    with pytest.raises(FaultError) as caught:
        template.parse(argv)
    assert caught.value.fault.code == "load_failed"


def test_a_text_never_passes_for_an_option():
    items = template.parse(["p", "{a}"])
    with pytest.raises(FaultError) as caught:
        template.render(items, lambda _: "--exec=rm")
    assert caught.value.fault.field == "args.a"
    assert template.render(items, lambda _: -5) == ["p", "-5"]
    assert template.render(template.parse(["p", "--a={a}"]), lambda _: "-x") == ["p", "--a=-x"]


@given(st.dictionaries(st.sampled_from(["a", "b", "c"]), _VALUES, min_size=3))
def test_any_values_give_exactly_one_string_per_item(values):
    items = template.parse(["p", "x{a}{b}", "x{c}", "tail"])
    rendered = template.render(items, values.__getitem__)
    assert len(rendered) == 4
    assert (rendered[0], rendered[3]) == ("p", "tail")


@given(st.text().filter(bool))
def test_text_with_doubled_braces_comes_back_as_it_was(text):
    items = template.parse(["p", text.replace("{", "{{").replace("}", "}}")])
    assert template.render(items, dict[str, str]().__getitem__) == ["p", text]
