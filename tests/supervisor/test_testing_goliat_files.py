"""Forms are read, and files are given as a tree and as one archive."""

from __future__ import annotations

import io
import zipfile

from supervisor.testing_goliat_files import archive, form, tree

FILES = {"split_1/b": b"22", "split_1/deep/c": b"", "split_0/a": b"1", "top": b"333"}
BODY = (
    b'--x\r\nContent-Disposition: form-data; name="relativePath"\r\n\r\nsplit_0\r\n'
    b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.bin"\r\n\r\n\x00\r\n\xff\r\n--x--\r\n'
)


def test_a_form_is_read_field_by_field() -> None:
    assert form("multipart/form-data; boundary=x", BODY) == [
        ("relativePath", "", b"split_0"),
        ("files", "a.bin", b"\x00\r\n\xff"),
    ]


def test_what_is_no_form_has_no_fields() -> None:
    assert form("application/json", b"{}") == []
    assert form("", b"") == []


def test_a_tree_has_folders_first() -> None:
    nodes = tree(FILES)
    assert [(node["type"], node["path"]) for node in nodes] == [
        ("directory", "split_0"),
        ("directory", "split_1"),
        ("file", "top"),
    ]
    assert [node["path"] for node in nodes[1]["children"]] == ["split_1/deep", "split_1/b"]
    assert nodes[1]["children"][1] == {"name": "b", "type": "file", "path": "split_1/b", "size": 2}


def test_an_archive_has_all_of_them() -> None:
    with zipfile.ZipFile(io.BytesIO(archive(FILES))) as packed:
        assert {name: packed.read(name) for name in packed.namelist()} == FILES
