"""Turns the output of `supervisor selftest --json` into the tables of FAILURES.md (all cases) and README.md (a few)."""

from __future__ import annotations

import json
import platform
import re
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- failures: written by scripts/failures -->", "<!-- failures end -->"
# What an owner asks first. The rest is in FAILURES.md.
SHOWN = (
    "segv", "crash-streaming", "crash-beside", "crash-loop", "hang-gil", "ignore-term", "deadline", "memory",
    "disk-many", "daemon", "fork-bomb", "spy", "sockets", "symlink",
)  # fmt: skip
Row = dict[str, Any]


def cell(text: str) -> str:
    """Text that breaks no table."""
    return " ".join(text.split()).replace("|", "\\|").rstrip(".")


def again(row: Row) -> str:
    """When the model answered the next caller."""
    return f"{row['recovered_s']:.2f} s" if row["recovered_s"] is not None else "-"


def short_table(rows: list[Row]) -> str:
    """The README's."""
    by_name = {row["name"]: row for row in rows}
    lines = ["| an engine … | what follows | caller answered | answers again |", "|---|---|---|---|"]
    for name in SHOWN:
        row = by_name[name]
        lines.append(f"| {cell(row['title'])} | {cell(row['expected'])} | {row['seconds']:.2f} s | {again(row)} |")
    return "\n".join(lines)


def whole_page(rows: list[Row]) -> str:
    """FAILURES.md."""
    contained = sum(row["contained"] for row in rows)
    lacks = sorted({re.sub(r" /[^)]*", "", lack) for row in rows for lack in row["lacks"]})  # no paths of ours
    lines = [
        "# How it fails",
        "",
        "Written by `scripts/failures` from `supervisor selftest --json`; run `supervisor selftest` for your own box.",
        f"Measured {time.strftime('%Y-%m-%d')} on {platform.system()} {platform.machine()}, Python "
        f"{platform.python_version()}: {contained} of {len(rows)} contained.",
        "Times are of one run on a shared machine: until the caller had its answer, and until the next run succeeded.",
    ]
    if lacks:
        lines.append(f"Layers of the sandbox that this box did not give whole: {', '.join(lacks)}.")
    for group in dict.fromkeys(row["group"] for row in rows):
        lines += ["", f"## {group.capitalize()}", ""]
        lines += [
            "| case | an engine … | expected | what happened | answered | contained |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| `{row['name']}` | {cell(row['title'])} | {cell(row['expected'])} | {cell(row['outcome'])} | "
            f"{row['seconds']:.2f} s | {'yes' if row['contained'] else '**no**'} |"
            for row in rows
            if row["group"] == group
        ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Entry point."""
    rows: list[Row] = json.loads(Path(sys.argv[1]).read_text())
    (ROOT / "FAILURES.md").write_text(whole_page(rows))
    readme = ROOT / "README.md"
    text = readme.read_text()
    block = f"{BEGIN}\n{short_table(rows)}\n{END}"
    changed, count = re.subn(re.escape(BEGIN) + r".*?" + re.escape(END), lambda _match: block, text, flags=re.DOTALL)
    if count != 1:
        print(f"README.md has no place for the table: {BEGIN} … {END}", file=sys.stderr)
        return 1
    readme.write_text(changed)
    print(f"{len(rows)} cases into FAILURES.md, {len(SHOWN)} of them into README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
