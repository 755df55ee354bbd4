"""The form of results is multipart as its standard has it, and its length is known before it is sent."""

from __future__ import annotations

import email.parser
import email.policy
import functools
import hashlib
import os
from pathlib import Path

import pytest

from protocol.engine_wire import OutputFile
from supervisor.link.dialects.goliat_upload import Form, Part


def part(folder: Path, name: str, content: bytes, moved: list[int]) -> Part:
    path = folder / hashlib.sha256(name.encode()).hexdigest()
    path.write_bytes(content)
    file = OutputFile(name, "text/plain", len(content), hashlib.sha256(content).hexdigest())
    return Part(file, functools.partial(os.open, path, os.O_RDONLY), moved.append)


@pytest.mark.parametrize(
    "files",
    [{}, {"a": b""}, {"a": b"x" * 2_500_000, "b c.txt": b"\r\n--x--\r\n"}, {'q"\r\n': b"1", "ü": b"2"}],
    ids=["none", "empty", "large", "odd names"],
)
async def test_what_is_sent_is_what_was_announced(tmp_path: Path, files: dict[str, bytes]) -> None:
    moved: list[int] = []
    form = Form("split_3", [part(tmp_path, name, content, moved) for name, content in files.items()])
    body = b"".join([piece async for piece in form])
    assert form.headers["Content-Length"] == str(len(body))
    assert sum(moved) == sum(map(len, files.values()))
    raw = f"Content-Type: {form.headers['Content-Type']}\r\n\r\n".encode() + body
    fields = list(email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(raw).iter_parts())
    names = [field.get_param("name", header="content-disposition") for field in fields]
    assert names == ["relativePath", *["files"] * len(files)]
    payloads = [field.get_payload(decode=True) for field in fields]
    assert payloads == [b"split_3", *files.values()]
    for field, name in zip(fields[1:], files, strict=True):
        told = str(field.get_filename()).encode("utf-8", "surrogateescape").decode()
        assert told == name.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")


async def test_a_form_that_is_given_up_leaves_no_file_open(tmp_path: Path) -> None:
    opened: list[int] = []
    one = part(tmp_path, "a", b"x" * 3_000_000, [])

    def opener() -> int:
        opened.append(one.open())
        return opened[-1]

    form = Form("x", [one._replace(open=opener)])
    steps = form.__aiter__()
    for _ in range(3):
        await steps.__anext__()
    os.fstat(opened[0])
    await form.aclose()
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(opened[0])
