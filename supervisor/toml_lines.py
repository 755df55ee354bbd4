"""Where each key of a TOML file stands: dotted path -> line number.

tomllib tells values but not places. This scanner reads a file that tomllib has accepted, so it needs to know
just enough of the grammar to find keys: headers, dotted and quoted keys, and where a value ends. Keys inside an
inline table have the place of the statement that holds them.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from typing import NamedTuple

Path = tuple[str | int, ...]
_BARE = re.compile(r"[A-Za-z0-9_-]+")


class Statement(NamedTuple):
    """A header, or a key with its value.

    Attributes:
        path: what it defines; the item of an array of tables goes by its index.
        table: path of the header above it; for a header, its own.
        start, end: offsets of its first line, and behind its last one.
        header: whether it is one.
    """

    path: Path
    table: Path
    start: int
    end: int
    header: bool


def statements(text: str) -> list[Statement]:
    """The statements of `text`, which must be valid TOML, in their order; comments are at their ends or between."""
    scanner = _Scanner(text)
    scanner.scan()
    return scanner.statements


def key_lines(text: str) -> dict[Path, int]:
    """Return the line (from 1) of each table, array item and key of `text`, which must be valid TOML."""
    return _Scanner(text).scan()


def line_of(path: Path, lines: Mapping[Path, int]) -> int | None:
    """Line of `path`, or of the nearest parent that has one."""
    for end in range(len(path), 0, -1):
        if path[:end] in lines:
            return lines[path[:end]]
    return None


class _Scanner:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._seen, self._line = 0, 1  # the line at offset `_seen`: counting from the top each time would be quadratic
        self._table: Path = ()
        self._lines: dict[Path, int] = {}
        self._counts: dict[Path, int] = {}  # items so far of each array of tables
        self.statements: list[Statement] = []

    def scan(self) -> dict[Path, int]:
        while self._skip_blank():
            self._line += self._text.count("\n", self._seen, self._at)
            self._seen, line = self._at, self._line
            start = self._text.rfind("\n", 0, self._at) + 1
            header = self._text[self._at] == "["
            if header:
                self._header(line)
                path = self._table
            else:
                path = self._table + self._key("=")
                self._lines.setdefault(path, line)
                self._at += 1
            self._value()  # of a header, the rest of its line
            end = min(self._at + 1, len(self._text))
            self.statements.append(Statement(path, self._table, start, end, header))
        return self._lines

    def _header(self, line: int) -> None:
        double = self._text.startswith("[[", self._at)
        self._at += 2 if double else 1
        path = self._indexed(self._key("]"), last=not double)
        self._at += 2 if double else 1
        if double:
            self._lines.setdefault(path, line)
            self._counts[path] = self._counts.get(path, 0) + 1
            path = (*path, self._counts[path] - 1)
        self._table = path
        self._lines.setdefault(path, line)

    def _indexed(self, keys: Path, *, last: bool) -> Path:
        """Insert the index of the current item behind each part that is an array of tables."""
        path: Path = ()
        for number, key in enumerate(keys):
            path = (*path, key)
            if path in self._counts and (last or number < len(keys) - 1):
                path = (*path, self._counts[path] - 1)
        return path

    def _key(self, end: str) -> Path:
        """Read a dotted key up to `end`; tomllib itself takes it apart, so quoting is judged by one parser."""
        start = self._at
        while self._text[self._at] != end:
            self._at += self._string_length() or 1
        text = self._text[start : self._at].strip()
        if _BARE.fullmatch(text):
            return (text,)
        value: object = tomllib.loads(f"{text} = 0")
        keys: list[str] = []
        while isinstance(value, dict):
            ((key, value),) = value.items()
            keys.append(key)
        return tuple(keys)

    def _value(self) -> None:
        """Skip a value: to the end of the line that closes all its brackets."""
        depth = 0
        while self._at < len(self._text):
            char = self._text[self._at]
            if char == "#":
                self._skip_comment()
            elif length := self._string_length():
                self._at += length
            elif char == "\n" and depth == 0:
                return
            else:
                depth += (char in "[{") - (char in "]}")
                self._at += 1

    def _string_length(self) -> int:
        """Length of the string literal that starts here, quotes included; 0 when none does."""
        quote = self._text[self._at]
        if quote not in "\"'":
            return 0
        triple = quote * 3
        fence = triple if self._text.startswith(triple, self._at) else quote
        at = self._at + len(fence)
        while not self._text.startswith(fence, at):
            at += 2 if quote == '"' and self._text[at] == "\\" else 1
        at += len(fence)
        while fence == triple and self._text.startswith(quote, at):
            at += 1  # up to two more quotes belong to the string
        return at - self._at

    def _skip_comment(self) -> None:
        end = self._text.find("\n", self._at)
        self._at = len(self._text) if end < 0 else end

    def _skip_blank(self) -> bool:
        """Move to the next statement; False at the end."""
        while self._at < len(self._text):
            if self._text[self._at] == "#":
                self._skip_comment()
            elif self._text[self._at] in " \t\r\n":
                self._at += 1
            else:
                return True
        return False
