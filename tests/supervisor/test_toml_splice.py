"""One value changes, every other byte stays: for any layout that people write."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.toml_lines import Path, key_lines
from supervisor.toml_splice import drop, inline, put, put_item

TWO = """\
# head

# the first
[[models]]
name = "a" # a
engine = "synthetic"

[log] # between
level = "info"

# the second
[[models]]
name = "b"
[models.options]
slots = 1 # one
# tail
"""


@pytest.mark.parametrize(
    ("text", "path", "value", "after"),
    [
        ("a.b = 5 # five\na.c = 6\n", ("a", "b"), 7, "a.b = 7 # five\na.c = 6\n"),
        ("a.b = 5 # five\n[x]\n", ("a", "c"), 7, "a.b = 5 # five\na.c = 7\n[x]\n"),
        ("[t]\na.b = 5\n[u]\n", ("t", "a", "c"), 7, "[t]\na.b = 5\na.c = 7\n[u]\n"),
        ("[a]\nb = 1\n\n# of c\n[c]\n", ("a", "d"), 2, "[a]\nb = 1\nd = 2\n\n# of c\n[c]\n"),
        ("[a] # empty\n", ("a", "d"), 2, "[a] # empty\nd = 2\n"),
        ("[a]\nb = 1", ("a", "d"), 2, "[a]\nb = 1\nd = 2\n"),
        ("[a]\nb = 1", ("c", "d"), "x", '[a]\nb = 1\n\n[c]\nd = "x"\n'),
        ("", ("c", "d"), "x", '[c]\nd = "x"\n'),
        ("# c\n[a]\nb = 1\n", ("top",), 2, "# c\ntop = 2\n\n[a]\nb = 1\n"),
        ("# head\n\n# c\n[a]\nb = 1\n", ("top",), 2, "# head\n\ntop = 2\n\n# c\n[a]\nb = 1\n"),
        ("[a.b]\nc = 1\n[x]\n[a.d]\n", ("a", "e"), 2, "[a.b]\nc = 1\n[x]\n[a.d]\n\n[a]\ne = 2\n"),
        ("a = { b = 1 } # c\n", ("a", "b"), 2, "a = { b = 2 } # c\n"),
        ("a = { b = { c = 1 } }\n", ("a", "b", "c"), 2, "a = { b = { c = 2 } }\n"),
        ("\"a\".'b c' = 1\n", ("a", "b c"), 2, "\"a\".'b c' = 2\n"),
        ("[a]\n", ("a", "b c"), 2, '[a]\n"b c" = 2\n'),
        ("[a]\nb = [\n 1, # one\n]\nc = 1\n", ("a", "c"), 2, "[a]\nb = [\n 1, # one\n]\nc = 2\n"),
        ('[a]\nb = """\n[x]\n"""\nc = 1\n', ("a", "b"), "y", '[a]\nb = "y"\nc = 1\n'),
        (TWO, ("models", 1, "name"), "c", TWO.replace('"b"', '"c"')),
        (TWO, ("models", 0, "device"), "cpu", TWO.replace('tic"\n', 'tic"\ndevice = "cpu"\n')),
        (TWO, ("models", 1, "options", "slots"), 2, TWO.replace("slots = 1", "slots = 2")),
        (TWO, ("models", 0, "options", "slots"), 2, TWO.replace('tic"\n', 'tic"\n\n[models.options]\nslots = 2\n')),
        ("m = [{ n = 1 }, { n = 2 }] # c\n", ("m", 1, "n"), 3, "m = [{ n = 1 }, { n = 3 }] # c\n"),
        ("[a.b]\nc = 1 # old\n[x]\n", ("a", "b"), {"d": 2}, "[x]\n\n[a.b]\nd = 2\n"),
        ("[a]\n", ("a", "b"), {}, "[a]\nb = {}\n"),
    ],
)
def test_put(text: str, path: Path, value: Any, after: str):
    assert put(text, path, value) == after
    tomllib.loads(after)


@pytest.mark.parametrize(
    ("text", "path", "after"),
    [
        ("a.b = 5 # five\na.c = 6\n", ("a", "b"), "a.c = 6\n"),
        ("[a]\nb = 1\n\n# of c\n[c]\nd = 1\n", ("a",), "# of c\n[c]\nd = 1\n"),
        ("x = 1\n\n[a]\nb = 1\n\n[a.e]\n\n# of c\n[c]\nd = 1\n", ("a",), "x = 1\n\n# of c\n[c]\nd = 1\n"),
        ("[a]\nb = 1\n[c]\n[a.d]\ne = 1\n", ("a",), "[c]\n"),
        ("a = { b = 1, c = 2 } # x\n", ("a", "c"), "a = { b = 1  } # x\n"),
        ("m = [\n {n = 1}, # one\n {n = 2}, # two\n]\n", ("m", 1), "m = [\n {n = 1}, # one\n]\n"),
        (TWO, ("models", 0), TWO.replace('[[models]]\nname = "a" # a\nengine = "synthetic"\n\n', "")),
        (TWO, ("models", 1), TWO[: TWO.index('[[models]]\nname = "b"')] + "# tail\n"),
        (TWO, ("models", 1, "options"), TWO.replace("[models.options]\nslots = 1 # one\n", "")),
    ],
)
def test_drop(text: str, path: Path, after: str):
    got = drop(text, path)
    assert tomllib.loads(got) == tomllib.loads(after)
    assert [line for line in got.splitlines() if "#" in line] == [line for line in after.splitlines() if "#" in line]
    assert "\n\n\n" not in got


@pytest.mark.parametrize("path", [("z",), ("models", 2), ("models", 0, "device"), ("log", "level", "x")])
def test_drop_of_what_is_not_there(path: Path):
    with pytest.raises((KeyError, TypeError)):
        drop(TWO, path)


@pytest.mark.parametrize(
    ("text", "path"), [("a = 3\n", ("a", "b")), ("m = 3\n", ("m", 0, "b")), (TWO, ("models", 7, "x", "y"))]
)
def test_put_where_there_is_no_place(text: str, path: Path):
    with pytest.raises((TypeError, IndexError, KeyError, AttributeError)):
        put(text, path, 1)


def test_items_of_an_array_of_tables():
    third = '[[models]]\nname = "c"\n'
    assert put_item(TWO, ("models", 1), third) == TWO.replace(
        '[[models]]\nname = "b"\n[models.options]\nslots = 1 # one\n', third
    )
    assert put_item(TWO, ("models", 2), third) == TWO.replace("# one\n", f"# one\n\n{third}")
    assert put_item("", ("models", 0), third) == third
    assert put_item("[log]", ("models", 0), third) == f"[log]\n\n{third}"


@pytest.mark.parametrize("value", [None, b"x", float("nan"), "\udcff", [None], {"a": object()}])
def test_what_toml_does_not_have(value: Any):
    with pytest.raises(ValueError, match=r"TOML has no|nan is no|half a character"):
        inline(value)


values = st.one_of(st.integers(-9, 9), st.booleans(), st.text(max_size=5), st.lists(st.integers(0, 9), max_size=3))
keys = st.sampled_from(["a", "b", "c d", "é"])
documents = st.recursive(
    st.dictionaries(keys, values, max_size=3), lambda d: st.dictionaries(keys, d | values, max_size=3)
)


@given(document=documents, path=st.lists(keys, min_size=1, max_size=3), value=values, dotted=st.booleans())
def test_any_document_has_one_value_more(document: dict[str, Any], path: list[str], value: Any, dotted: bool):
    text = _rendered(document, dotted)
    assert tomllib.loads(text) == document
    expected = tomllib.loads(text)
    here = expected
    for part in path[:-1]:
        here = here.setdefault(part, {})
        if not isinstance(here, dict):
            return
    if isinstance(here.get(path[-1]), dict):
        return
    here[path[-1]] = value
    after = put(text, tuple(path), value)
    assert tomllib.loads(after) == expected
    assert {line for line in text.splitlines() if line.startswith("#")} <= set(after.splitlines())
    assert key_lines(after)


def _rendered(document: dict[str, Any], dotted: bool, at: tuple[str, ...] = ()) -> str:
    """As tables with headers, or with every key dotted; a comment before each header."""
    from supervisor.config_keys import written

    lines = []
    for key, value in document.items():
        if not isinstance(value, dict) or not value:
            name = (*at, key) if dotted else (key,)
            lines.append(f"{written(name)} = {inline(value).as_string()}\n")
    for key, value in document.items():
        if isinstance(value, dict) and value:
            path = (*at, key)
            lines.append(_rendered(value, True, path) if dotted else f"# {written(path)}\n[{written(path)}]\n")
            lines.append("" if dotted else _rendered(value, False, path))
    return "".join(lines)
