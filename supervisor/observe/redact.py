"""Keeps secrets and callers' words out of everything that leaves the process as log, error report or trace.

Theory of operation. Two nets, one behind the other. The first works on values before they become text: a field named
like a secret, or like something that callers wrote (prompt, messages, …), is replaced, in extras and inside mappings
and structs given as arguments. The second works on the finished text, tracebacks included, and knows what secrets
look like. It prefers to hide too much: a hidden path costs a question, a shown token costs a machine.

Names of models, jobs and GPUs are shown on purpose: they are what a log line is about.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

HIDDEN = "[hidden]"
# What callers wrote, or what engines answered them. Never shown, only measured.
WORDS = frozenset(
    {
        "prompt",
        "prompts",
        "negative_prompt",
        "messages",
        "input",
        "inputs",
        "params",
        "content",
        "text",
        "system",
        "argv",
        "args",
        "arguments",
        "answer",
        "completion",
        "generated_text",
        "input_value",
        "instructions",
        "suffix",
        "tools",
        "transcript",
        "documents",
        "query",
        "body",
    }
)
_SECRET_NAME = re.compile(
    r"(?i)(^|[_-])(token|secret|password|passwd|passphrase|pwd|authorization|cookie|dsn|credentials?|signature|sig"
    r"|api[_-]?key|client[_-]?key|private[_-]?key|access[_-]?key|sessionid)s?$"
)
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
# Fields that name something; long ones look like keys and are none.
_NAMES = frozenset({"job", "attempt", "model", "engine", "kind", "gpu", "trace", "session"})
MAX_DEPTH = 6

_QUOTED = r"""(?:"(?:\\.|[^"\\])*"?|'(?:\\.|[^'\\])*'?)"""
_WORD_NAMES = "|".join(sorted(WORDS, key=len, reverse=True))
_Replace = str | Callable[[re.Match[str]], str]
_OUR_KEY_CHARS = 43  # token_urlsafe(32)


def _our_key(found: re.Match[str]) -> str:
    """Hide one of our keys, and what a line break has cut off it."""
    begun, gap, rest = found[2], found[3] or "", found[4] or ""
    whole = len(begun) + len(rest) == _OUR_KEY_CHARS
    return f"{found[1]}{HIDDEN}{gap}{HIDDEN if rest and whole else rest}"


# (what must occur in the lower-case text for the pattern to be worth a try, pattern, replacement)
_Pattern = tuple[tuple[str, ...], re.Pattern[str], _Replace]
_PATTERNS: tuple[_Pattern, ...] = (
    # What callers wrote, as JSON or as a repr shows it: "prompt": "…", prompt='…', 'messages': [ … to the end.
    # `\\?` because JSON inside JSON has its quotes escaped.
    (
        (":", "="),
        re.compile(rf"""(?is)(\b(?:{_WORD_NAMES})\\?["']?\s*[:=]\s*)(?:b?\\?{_QUOTED}|[\[{{(].*|[A-Z]\w*\(.*)"""),
        rf"\1{HIDDEN}",
    ),
    (
        ("prompt", "messages"),
        re.compile(r"(?i)\b((?:negative_)?prompts?|messages)(\s*[:=]\s*)(?!\[hidden\])[^\n]+"),
        rf"\1\2{HIDDEN}",
    ),
    (("prompt",), re.compile(r"""(?i)\b(prompt\b[^\n"'=:]{0,24} )(?:"[^"\n]*"|'[^'\n]*')"""), rf"\1{HIDDEN}"),
    # Headers, in every way that Python and HTTP write them.
    (
        ("authorization", "x-a", "cookie"),
        re.compile(
            r"""(?i)\b((?:proxy-)?authorization|x-api-key|x-auth-token|set-cookie|cookie)(["']?\s*[:=,]\s*(?:b(?=["']))?["']?)"""
            r"""(?:(?:bearer|basic|token)\s+)?[^\r\n"']+"""
        ),
        rf"\1\2{HIDDEN}",
    ),
    (("bearer",), re.compile(r"(?i)\b(bearer)\s+[A-Za-z0-9._~+/=-]+"), rf"\1 {HIDDEN}"),
    (("basic",), re.compile(r"\b([Bb]asic)\s+(?=[A-Za-z]*[A-Z0-9=+/])[A-Za-z0-9+/]{6,}={0,2}"), rf"\1 {HIDDEN}"),
    # URLs: user and password, and every parameter that grants something.
    (("@",), re.compile(r"(?i)(?<![a-z0-9])([a-z][a-z0-9+.-]{0,20}://)[^\s/\"'<>]+@"), rf"\1{HIDDEN}@"),
    # A password with a slash in it: what follows the name and its colon is no port.
    (
        ("://",),
        re.compile(
            r"(?i)(?<![a-z0-9])([a-z][a-z0-9+.-]{0,20}://)[^\s/@:\"'<>]+:(?!\d{1,5}(?:[/?#]|$))[^\s@\"'<>]{1,200}@"
        ),
        rf"\1{HIDDEN}@",
    ),
    (("@",), re.compile(r"(?<![\w/.+-])([\w.+-]{1,64}:)[^\s:@/\"'<>]{1,200}(?=@[A-Za-z0-9])"), rf"\1{HIDDEN}"),
    (
        ("=",),
        re.compile(
            r"(?i)([?&;](?:[a-z0-9_-]*(?:sig|signature|token|secret|password|passwd|pass|pwd|pw|auth"
            r"|credential|apikey|api[_-]key|hmac|key))=)[^&\s\"'<>]+"
        ),
        rf"\1{HIDDEN}",
    ),
    (
        ("%3d",),
        re.compile(r"(?i)((?:sig|signature|token|secret|password|credential|key)%3d)[^&%\s\"'<>]+"),
        rf"\1{HIDDEN}",
    ),
    (
        ("hooks.slack.com",),
        re.compile(r"(?i)(hooks\.slack\.com/(?:services|workflows)/)[A-Za-z0-9/_-]+"),
        rf"\1{HIDDEN}",
    ),
    # password=…, "token": "…"
    (
        ("token", "secret", "pass", "pwd", "key", "dsn", "sessionid"),
        re.compile(
            r"""(?i)((?:token|secret|password|passwd|passphrase|pwd|sessionid|api[_-]?key|client[_-]?key|private[_-]?key"""
            rf"""|access[_-]?key|\bdsn))(\\?["']?\s*[:=]\s*)(?!\[hidden\])(?:b?\\?{_QUOTED}|[^\s,;)}}\]]+)"""
        ),
        rf"\1\2{HIDDEN}",
    ),
    # --token …, ['--api-key', '…']; the token 'hunter2'
    (
        ("--",),
        re.compile(
            r"""(?i)(--(?:[a-z0-9-]{1,40}-)?(?:token|secret|password|passphrase|api-?key|key)["']?,?[ =]+["']?)"""
            r"""(?!\[hidden\])[^\s"',\])-][^\s"',\])]*"""
        ),
        rf"\1{HIDDEN}",
    ),
    (
        ("token", "secret", "pass", "key"),
        re.compile(
            r"""(?i)\b((?:token|secret|password|passphrase|api key)(?: (?:is|was|of))? )"""
            r"""(?:"[^"\n]*"|'[^'\n]*'|(?=[^\s"']*\d)(?=[^\s"']*[A-Za-z])[^\s"',;]{8,})"""
        ),
        rf"\1{HIDDEN}",
    ),
    # Keys by their own look.
    (
        ("bh",),
        re.compile(r"\b(bh[cwa]_)([A-Za-z0-9_-]{4,})(?:([ \t]*\r?\n[ \t]*)([A-Za-z0-9_-]{1,42})(?![A-Za-z0-9_-]))?"),
        _our_key,
    ),
    (("sk-",), re.compile(r"\b(sk-)[A-Za-z0-9_-]{6,}"), rf"\1{HIDDEN}"),
    (
        ("hf_", "gh", "glpat-", "xox", "xapp-", "akia", "asia", "npm_", "pypi-", "k_live_", "k_test_"),
        re.compile(
            r"\b((?i:hf)_|gh[pousr]_|github_pat_|glpat-|xox[abprs]-|xapp-|A[KS]IA|npm_|pypi-|[rs]k_(?:live|test)_)"
            r"[A-Za-z0-9_-]{8,}"
        ),
        rf"\1{HIDDEN}",
    ),
    (("eyj",), re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"), HIDDEN),
    (
        ("-----begin",),
        re.compile(
            r"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----.*?(?:-----END [A-Z ]*PRIVATE KEY(?: BLOCK)?-----|\Z)", re.S
        ),
        HIDDEN,
    ),
    # The last two go by length and randomness; what is a name by its field is spared them.
    # Long hex: a digest is still recognised by its first eight characters, a key is of no use with them.
    # One of the length of a sha256 in a sentence that speaks of one is no key, and people compare it.
    (
        ("",),
        re.compile(r"(?<![0-9A-Za-z])([0-9a-fA-F]{8})[0-9a-fA-F]{24,}(?![0-9A-Za-z])"),
        lambda found: found[0] if _digest(found) else f"{found[1]}…",
    ),
    (
        ("",),
        re.compile(r"[A-Za-z0-9+/_-]{32,}={0,2}"),
        lambda found: found[0] if _digest(found) else _key_or_not(found[0]),
    ),
)


def redacted(text: str) -> str:
    """The text without what looks like a secret or like a caller's words."""
    return _redacted(text, _PATTERNS)


def _redacted(text: str, patterns: Sequence[_Pattern]) -> str:
    lowered = text.lower()
    for needles, pattern, replacement in patterns:
        if any(needle in lowered for needle in needles):
            text = pattern.sub(replacement, text)
    return text


def redacted_trace(text: str) -> str:
    """A traceback, redacted: each line of source by itself, the texts of exceptions whole.

    `messages=[` in a line of source would else hide everything that follows it.
    """
    parts: list[str] = []
    message: list[str] = []
    source_lines = 0
    for line in text.split("\n"):
        if line.startswith('  File "'):
            source_lines = 3  # at most: the line, and its marks
        elif source_lines and line.startswith("    "):
            source_lines -= 1
        else:
            source_lines = 0
            message.append(line)
            continue
        if message:
            parts.append(redacted("\n".join(message)))
            message = []
        parts.append(redacted(line))
    return "\n".join([*parts, redacted("\n".join(message))] if message else parts)


# Changes of class (lower, upper, digit) from one character to the next within words, as a share of the length. Of
# 100,000 random keys 6 have less (measured); "Qwen3-Coder-30B-A3B-Instruct-Q4_K_M" has 0.24.
RANDOM_SHARE = 0.27
_SHA256 = re.compile(r"[0-9a-f]{64}")
_UUID = re.compile(r"(?:[A-Za-z0-9_]*[-_])?[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


def _digest(found: re.Match[str]) -> bool:
    """Whether a run has the shape of a sha256, in a text that speaks of one."""
    return bool(_SHA256.fullmatch(found[0])) and "sha256" in found.string.lower()


def _key_or_not(run: str) -> str:
    """Hide a long run of base64 characters when it is random; an UUID names something and stays."""
    if _UUID.fullmatch(run):
        return run
    classes = [1 if char.islower() else 2 if char.isupper() else 3 if char.isdigit() else 0 for char in run]
    changes = sum(one != two for one, two in itertools.pairwise(classes) if one and two)
    return HIDDEN if changes >= RANDOM_SHARE * len(run.rstrip("=")) else run


def safe(value: Any, name: str = "", depth: int = 0) -> Any:
    """A value that may be shown: numbers as they are, texts redacted, containers and structs field by field.

    Args:
        name: of the field that holds it; decides on its own for names of secrets and of callers' words.
    """
    if isinstance(value, bool | int | float) or value is None:
        return value
    if name.lower() in WORDS:
        return _measured(value)
    if name and _names_secret(name):
        return HIDDEN
    if isinstance(value, str):
        named = name in _NAMES and len(value) <= 200 and " " not in value
        return _redacted(value, _PATTERNS[:-2]) if named else redacted(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return f"[{len(value)} bytes]"
    if depth >= MAX_DEPTH:
        return f"[{type(value).__name__}]"
    if isinstance(value, Mapping):
        return {redacted(str(key)): safe(each, str(key), depth + 1) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return _safe_items(list(value), depth)
    if isinstance(value, msgspec.Struct):
        return {key: safe(getattr(value, key), key, depth + 1) for key in value.__struct_fields__}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: safe(getattr(value, each.name), each.name, depth + 1) for each in dataclasses.fields(value)}
    return redacted(str(value))


def _names_secret(name: str) -> bool:
    return bool(_SECRET_NAME.search(_HUMP.sub("_", name)))


def _safe_items(items: list[Any], depth: int) -> list[Any]:
    """Items one by one; what follows the name of a secret (a header as a pair, an option of a command) is one."""
    if items and all(isinstance(each, str) for each in items):
        items = list(redacted("\n".join(items)).split("\n"))  # lines of one text: a key may go over several
    return [
        HIDDEN if number and _is_name(items[number - 1]) else safe(each, "", depth + 1)
        for number, each in enumerate(items)
    ]


def _is_name(item: Any) -> bool:
    """Whether an item is no value but says what follows it."""
    text = item.decode("ascii", "replace") if isinstance(item, bytes) else item
    return isinstance(text, str) and len(text) <= 64 and _names_secret(text)


def _measured(value: Any) -> str:
    try:
        return f"[hidden, {len(value)} long]"
    except TypeError:
        return HIDDEN


# What makes a LogRecord; all else in it came as `extra`.
STANDARD = frozenset(vars(logging.LogRecord("", 0, "", 0, "", (), None))) | {"message", "asctime", "taskName"}
_FORMATTER = logging.Formatter()


class Redaction(logging.Filter):
    """Rewrites a record in place so that nothing which formats it later can leak.

    Args are applied and gone, the traceback is text, extras are safe. What cannot be formatted is said to be so;
    logging never raises into the code that logs.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Always True."""
        record.msg = _message(record)
        record.args = None
        if record.exc_info and record.exc_info[0] is not None:
            record.exc_text = redacted_trace(_FORMATTER.formatException(record.exc_info))
        elif record.exc_text:
            record.exc_text = redacted_trace(record.exc_text)
        record.exc_info = None
        if record.stack_info:
            record.stack_info = redacted(record.stack_info)
        for name, value in list(vars(record).items()):
            if name not in STANDARD:
                setattr(record, name, safe(value, name))
        return True


def _message(record: logging.LogRecord) -> str:
    """The finished sentence. A `%` that does not fit is the caller's mistake and must not end anything."""
    try:
        text = str(record.msg)
        if record.args:
            text %= _arguments(record.args)
    except Exception as error:  # whatever a __str__ of somebody else raises
        return f"[a log line that cannot be formatted: {type(error).__name__}] {redacted(str(record.msg)[:200])}"
    return redacted(text)


def _arguments(args: Any) -> Any:
    if isinstance(args, Mapping):
        return {key: _argument(value, str(key)) for key, value in args.items()}
    return tuple(
        HIDDEN if number and isinstance(each, str) and _is_name(args[number - 1]) else _argument(each)
        for number, each in enumerate(args)
    )


def _argument(value: Any, name: str = "") -> Any:
    """Structured values are made safe; what has a text of its own keeps it and is redacted with the sentence."""
    if name or isinstance(value, Mapping | list | tuple | set | frozenset | bytes | msgspec.Struct):
        return safe(value, name)
    return safe(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
