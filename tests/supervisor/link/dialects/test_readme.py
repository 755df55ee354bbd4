"""The document of the dialects against the code: every dialect has its row, every native word that is named exists."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from protocol import link_wire
from supervisor.link import dialects
from supervisor.link.dialects import DIALECTS

TEXT = (Path(dialects.__file__).parent / "README.md").read_text()


def rows(first: str) -> list[list[str]]:
    """The cells of the table whose head begins with this cell, without head and ruler."""
    table = TEXT.split(f"\n| {first} |", 1)[1].split("\n\n", 1)[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:]]


def test_every_dialect_has_a_row_and_files() -> None:
    folder = Path(dialects.__file__).parent
    found = {row[0].strip("| `"): row[-1].strip(" |") for row in rows("`[coordinator] dialect`")}
    assert set(found) == set(DIALECTS)
    assert all(list(folder.glob(pattern)) for pattern in found.values())


def test_verbs_of_others_are_mapped_onto_words_that_the_native_protocol_has() -> None:
    bodies = {**link_wire.UP, **link_wire.DOWN}
    types = [*bodies.values(), link_wire.Capabilities, link_wire.GpuState]
    fields = {field.name for type_ in types for field in msgspec.structs.fields(type_)} | {"compute_ms"}
    mapped = {row[0].strip("| "): row[-1] for row in rows("verb")}
    wanted = {"register", "heartbeat", "job assignment", "complete", "failed", "pause", "resume", "shutdown"}
    assert set(mapped) >= wanted
    for verb, native in mapped.items():
        for named in re.findall(r"`([^`]+)`", native):
            if named.startswith("supervisor "):
                continue
            tag = re.match(r"[a-z_]+", named)
            assert tag is not None, named
            inside = re.findall(r"[a-z_]+", named[tag.end() :])
            assert tag[0] in bodies or tag[0] in fields, f"{verb}: {named}"
            assert set(inside) <= fields, f"{verb}: {named}"
