"""What the page is made of: static files without a build step, and the headers that nothing may loosen."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response

FOLDER = Path(__file__).parents[1] / "page"
PREFIX = "/dashboard/"
LOGIN = f"{PREFIX}login"
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}
_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}


class File(NamedTuple):
    """One file in memory; `tag` is its ETag."""

    data: bytes
    kind: str
    tag: str


@functools.cache
def files() -> Mapping[str, File]:
    """The files by path. They hold no secret, so they need no key."""
    found: dict[str, File] = {}
    for path in sorted(FOLDER.iterdir()):
        if path.suffix in _KINDS:
            data = path.read_bytes()
            tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
            found[f"{PREFIX}{path.name}"] = File(data, _KINDS[path.suffix], tag)
    found["/"] = found.pop(f"{PREFIX}index.html")
    return found


async def file(request: Request) -> Response:
    """One file; a browser that has it already is told so."""
    found = files()[request.url.path]
    headers = {**HEADERS, "etag": found.tag, "cache-control": "no-cache"}
    if request.headers.get("if-none-match") == found.tag:
        return Response(status_code=304, headers=headers)
    return Response(found.data, media_type=found.kind, headers=headers)
