"""Models that can be pulled by a name: the shipped list, and the user's `catalogue.toml` beside worker.toml.

Both are TOML of one format, described at the top of known_models.toml. The user's file is only ever read: a mistake in
it ends the command with its line, and nothing is written over it.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from engines.catalog import CATALOG
from protocol.work import is_kind
from supervisor.config_walk import BAD, build, did_you_mean, dotted
from supervisor.errors import ConfigError
from supervisor.toml_lines import Path as KeyPath
from supervisor.toml_lines import key_lines, line_of

SHIPPED = Path(__file__).with_name("known_models.toml")
OWN = "catalogue.toml"
_Gibibytes = Annotated[float, Meta(ge=0, le=1e6)]


class Known(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model that can be pulled by its name; the fields are described in known_models.toml."""

    source: Annotated[str, Meta(min_length=1)]
    kind: str
    engine: str
    file: str = ""
    revision: str = ""
    sha256: Annotated[str, Meta(pattern="^([0-9a-fA-F]{64})?$")] = ""
    options: dict[str, Any] = {}
    size_gb: _Gibibytes = 0.0
    vram_gb: _Gibibytes = 0.0
    licence: str = ""
    about: str = ""

    def where(self) -> str:
        """What a user would have written instead of the name."""
        return self.source + (f"@{self.revision}" if self.revision else "") + (f":{self.file}" if self.file else "")


def known_models(config: Path) -> dict[str, Known]:
    """All models that can be pulled by name, the user's own first.

    Args:
        config: worker.toml; it need not exist.

    Raises:
        ConfigError: catalogue.toml has mistakes; all of them are named.
    """
    own = config.parent / OWN
    mine = read(own) if own.exists() else {}
    return {**mine, **{name: known for name, known in read(SHIPPED).items() if name not in mine}}


def read(path: Path) -> dict[str, Known]:
    """Read one file; local sources become absolute. Raises ConfigError with every mistake."""
    try:
        text = path.read_bytes().decode()
        raw = tomllib.loads(text)
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: is not UTF-8 text (byte {error.start})"]) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([f"{path}: {error}"]) from None
    lines = key_lines(text)
    problems: list[tuple[int, str]] = []

    def report(at: KeyPath, sentence: str) -> None:
        line = line_of(at, lines)
        place = f"{path}:{line}" if line else str(path)
        problems.append((line or 0, f"{place}: {dotted(at)}: {sentence}"))

    found: dict[str, Known] = build(raw, dict[str, Known], (), report)
    for name, known in found.items():
        if known is not BAD:
            for field, sentence in _mistakes(name, known):
                report((name, field) if field else (name,), sentence)
    if problems:
        raise ConfigError([sentence for _, sentence in sorted(problems)])
    return {name: _at_home(known, path.parent) for name, known in found.items()}


def _mistakes(name: str, known: Known) -> list[tuple[str, str]]:
    found = []
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        found.append(("", "a name is letters, digits and . _ - only, so that it is no path and no repository"))
    if known.engine not in CATALOG:
        found.append(("engine", f'there is no engine "{known.engine}"{did_you_mean(known.engine, CATALOG)}'))
    elif not is_kind(known.kind) or known.kind not in CATALOG[known.engine].kinds:
        kinds = CATALOG[known.engine].kinds
        found.append(("kind", f'"{known.kind}" is nothing that {known.engine} does (known: {", ".join(kinds)})'))
    return found


def _at_home(known: Known, folder: Path) -> Known:
    """`./x.gguf` and `~/x.gguf` of a catalogue belong to its folder and to the home, as paths in worker.toml do."""
    if known.source[0] not in "./~":
        return known
    return msgspec.structs.replace(known, source=str(folder / Path(known.source).expanduser()))


def search(known: Mapping[str, Known], words: Sequence[str]) -> dict[str, Known]:
    """The models of which every word is a part of the name, the kind, the engine, the source or the description."""
    found = {}
    for name, model in known.items():
        text = " ".join((name, model.kind, model.engine, model.source, model.about, model.licence)).lower()
        if all(word.lower() in text for word in words):
            found[name] = model
    return found


def near(known: Mapping[str, Known], word: str) -> str:
    """The name that a misspelt word may mean, "" when none is near."""
    found = difflib.get_close_matches(word.lower(), known, 1)
    return found[0] if found else ""
