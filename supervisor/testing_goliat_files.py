"""Files that a GOLIAT dashboard for tests gets and gives: forms in; a tree, or one archive of all, out."""

from __future__ import annotations

import email.parser
import email.policy
import io
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple


class Field(NamedTuple):
    """Of a form. `filename` is "" for what is no file."""

    name: str
    filename: str
    content: bytes


def form(kind: str, body: bytes) -> list[Field]:
    """The fields of a multipart body with this content type; none when it is something else."""
    raw = f"Content-Type: {kind}\r\n\r\n".encode() + body
    message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(raw)
    if not message.is_multipart():
        return []
    fields = []
    for part in message.iter_parts():
        content = part.get_payload(decode=True)
        assert isinstance(content, bytes)
        name = str(part.get_param("name", header="content-disposition"))
        fields.append(Field(name, part.get_filename() or "", content))
    return fields


def tree(files: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """Paths as folders and files, by name, folders first."""
    root: list[dict[str, Any]] = []
    for path, content in sorted(files.items()):
        nodes, *folders, name = root, *path.split("/")
        for depth, folder in enumerate(folders, 1):
            node = next((each for each in nodes if each["type"] == "directory" and each["name"] == folder), None)
            if node is None:
                where = "/".join(folders[:depth])
                node = {"name": folder, "type": "directory", "path": where, "children": []}
                nodes.append(node)
            nodes = node["children"]
        nodes.append({"name": name, "type": "file", "path": path, "size": len(content)})
    _sort(root)
    return root


def _sort(nodes: list[dict[str, Any]]) -> None:
    nodes.sort(key=lambda node: (node["type"] != "directory", node["name"]))
    for node in nodes:
        _sort(node.get("children", []))


def archive(files: Mapping[str, bytes]) -> bytes:
    """All of them as a ZIP."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed:
        for path, content in sorted(files.items()):
            packed.writestr(path, content)
    return out.getvalue()
