from __future__ import annotations

import tomllib

from hypothesis import given
from hypothesis import strategies as st

from supervisor.toml_lines import key_lines, line_of

TEXT = '''\
# comment with = and [brackets]
top = 1
"quoted key" = "a # no comment"

[a.b]
c.d = """
[not.a.table]
x = 1
"""
list = [ # comment ]
  "]", 2,
]
inline = { k = 1, l = "}" }

[[m]]
n = 'lit\\'
[m.sub]
o = 1
[[m]]
n = """quote""""
[engines."v 2".more]
p = 2
[[m.inner]]
q = 1'''


def test_every_key_has_its_line():
    tomllib.loads(TEXT)
    assert key_lines(TEXT) == {
        ("top",): 2,
        ("quoted key",): 3,
        ("a", "b"): 5,
        ("a", "b", "c", "d"): 6,
        ("a", "b", "list"): 10,
        ("a", "b", "inline"): 13,
        ("m",): 15,
        ("m", 0): 15,
        ("m", 0, "n"): 16,
        ("m", 0, "sub"): 17,
        ("m", 0, "sub", "o"): 18,
        ("m", 1): 19,
        ("m", 1, "n"): 20,
        ("engines", "v 2", "more"): 21,
        ("engines", "v 2", "more", "p"): 22,
        ("m", 1, "inner"): 23,
        ("m", 1, "inner", 0): 23,
        ("m", 1, "inner", 0, "q"): 24,
    }


def test_what_has_no_line_takes_that_of_its_nearest_parent():
    lines = key_lines(TEXT)
    assert line_of(("a", "b", "inline", "k"), lines) == 13
    assert line_of(("m", 1, "name"), lines) == 19
    assert line_of(("nowhere",), lines) is None


_names = st.text("abc.\"'#=[]\\ \n", min_size=1, max_size=8)
_values = st.one_of(st.integers(), st.booleans(), st.text("ab#='\"[]{}\\\n,", max_size=12))


@given(st.dictionaries(_names, st.dictionaries(_names, st.one_of(_values, st.lists(_values)), max_size=3), max_size=3))
def test_any_file_that_is_valid_is_scanned_whole(tables):
    import tomlkit

    text = tomlkit.dumps(tables)
    assert tomllib.loads(text) == tables
    lines = key_lines(text)
    for name, table in tables.items():
        for key in table:
            assert (name, key) in lines, text
