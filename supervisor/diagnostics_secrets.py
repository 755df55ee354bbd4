"""Every secret that this machine can know, and striking it out of a text whatever it looks like."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus, unquote, urlsplit

import msgspec

from supervisor.config import is_secret
from supervisor.config_layers import drop_ins
from supervisor.observe.redact import HIDDEN
from supervisor.secrets import MAX_BYTES, VARIABLES
from supervisor.settings import Settings

SHORTEST = 4  # characters
# Below the state folder: keys of the embedded coordinator, and whatever else is a key by its name.
_KEY_FILES = ("*.key", "*.token", "*.pem", "*-token", "token", "*.secret")
_MOST_FILES = 200
# In a variable's name, besides what `is_secret` knows.
_SECRET_NAME = re.compile(r"(?i)dsn|auth|cookie|private|signature|bearer|pass")

_ASSIGNED = re.compile(r"""([\w.-]+)["']?[ \t]*=[ \t]*([^\n,}]+)""")


class Strike:
    """Strikes secrets out of texts, in every spelling that JSON, URLs and headers give them.

    Args:
        secrets: as they are; shorter ones than `SHORTEST` are left out.
    """

    def __init__(self, secrets: Iterable[str]) -> None:
        spellings = {text for secret in secrets if len(secret) >= SHORTEST for text in _spellings(secret)}
        # The longest first: one secret may be a part of another.
        longest_first = sorted(spellings, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if spellings else None

    def __call__(self, text: str) -> str:
        """The text without them. What a strike joins together is looked at again."""
        if self._pattern is None:
            return text
        if not self._pattern.search(HIDDEN):
            text = self._pattern.sub(HIDDEN, text)
        while self._pattern.search(text):  # shorter each time, so it ends
            text = self._pattern.sub("", text)
        return text


def _spellings(secret: str) -> Iterator[str]:
    yield secret
    yield json.dumps(secret)[1:-1]
    yield json.dumps(secret, ensure_ascii=False)[1:-1]
    yield msgspec.json.encode(secret).decode()[1:-1]
    yield repr(secret)[1:-1]
    yield ascii(secret)[1:-1]
    data = secret.encode("utf-8", "surrogateescape")
    yield quote(data, safe="")
    yield quote(data)
    yield quote_plus(data)
    yield base64.b64encode(data).decode().rstrip("=")
    yield base64.urlsafe_b64encode(data).decode().rstrip("=")
    yield data.hex()


def secret_values(settings: Sequence[Settings], state: Path, environ: Mapping[str, str]) -> set[str]:
    """Every secret of the settings, of the files they name, of the environment and of the state folder."""
    found: set[str] = set()
    for each in settings:
        found |= set(_of_settings(msgspec.to_builtins(each)))
        for file in _files_of(each):
            found |= set(_of_file(Path(file)))
    for name, value in environ.items():
        if name in VARIABLES.values() or is_secret(name) or _SECRET_NAME.search(name):
            # A variable that names a file of secrets is no secret itself, its file is.
            named = set(_of_file(Path(value)))
            found |= named if named or value.startswith("/") else set(_of_text(value))
        found |= set(_of_url(value))
    for path in _lying_in(state, environ):
        found |= set(_of_file(path))
    return {text for text in found if len(text) >= SHORTEST}


def secrets_of_toml(path: Path) -> set[str]:
    """Secrets that stand in worker.toml and its drop-ins, also in one with mistakes: those are shown, and quote it."""
    found: set[str] = set()
    for file in (path, *drop_ins(path)):
        try:
            text = file.read_text(errors="replace")
        except OSError:
            continue
        try:
            found |= set(_of_settings(tomllib.loads(text)))
        except tomllib.TOMLDecodeError:
            found |= {value.strip().strip("\"'") for name, value in _ASSIGNED.findall(text) if _hides_text(name)}
        for name, value in _ASSIGNED.findall(text):
            if _hides(name):
                found |= set(_of_file(path.parent / value.strip().strip("\"'")))
    return {each for each in found if len(each) >= SHORTEST}


def _of_settings(value: Any, name: str = "") -> Iterator[str]:
    """Values whose names say that they are secret, at any depth."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _all_texts(each) if _hides_text(str(key)) else _of_settings(each, str(key))
    elif isinstance(value, list):
        for each in value:
            yield from _of_settings(each, name)
    elif isinstance(value, str):
        yield from _of_url(value)


def _hides(name: str) -> bool:
    return is_secret(name) or bool(_SECRET_NAME.search(name))


def _hides_text(name: str) -> bool:
    """Whether the value itself is the secret, and not the name of a file."""
    return _hides(name) and not name.endswith(("_file", "_cert", "tls_key"))


def _all_texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for each in value.values():
            yield from _all_texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from _all_texts(each)
    elif isinstance(value, str):
        yield from _of_text(value)


def _of_url(text: str) -> Iterator[str]:
    """The password of an address."""
    if "://" not in text or "@" not in text:
        return
    with contextlib.suppress(ValueError):
        parts = urlsplit(text)
        if part := parts.password or parts.username:  # a key without a password stands in the user's place
            yield part
            yield unquote(part)


def _of_text(text: str) -> Iterator[str]:
    """A secret, and the parts of it that would be enough: its lines, and the value of a header."""
    for part in (text, text.strip(), *text.splitlines()):
        yield part
        yield part.strip()
        _name, colon, value = part.partition(":")
        if colon:
            yield value.strip()
            yield value.strip().partition(" ")[2].strip()  # Bearer …


def _files_of(settings: Settings) -> Iterator[str]:
    table = settings.coordinator
    for file in (table.token_file, table.tls_key, settings.log.sentry_dsn_file, settings.otel.headers_file):
        if file:
            yield file


def _lying_in(state: Path, environ: Mapping[str, str]) -> Iterator[Path]:
    credentials = environ.get("CREDENTIALS_DIRECTORY", "")
    if credentials:
        with contextlib.suppress(OSError):
            yield from sorted(Path(credentials).iterdir())[:_MOST_FILES]
    for folder in (state, state / "coordinator"):
        for pattern in _KEY_FILES:
            with contextlib.suppress(OSError):
                yield from sorted(folder.glob(pattern))[:_MOST_FILES]


def _of_file(path: Path) -> Iterator[str]:
    """What a file of secrets holds; nothing of one that cannot be read: then nobody can show it either."""
    try:
        if not path.is_file():
            return
        with path.open("rb") as file:
            data = file.read(MAX_BYTES)
    except (OSError, ValueError):
        return
    yield from _of_text(data.decode("utf-8", "replace"))
