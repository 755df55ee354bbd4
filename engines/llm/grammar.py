"""Is a GBNF grammar safe to give to llama.cpp? Judged before any sampler exists.

llama.cpp returns NULL for a grammar that it cannot parse; llama-cpp-python does not look and dies of SIGSEGV at the
first token. The parser is recursive, so that nesting alone could overflow the stack of the process: depth is bounded
here before the parser sees the text.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable

from protocol.faults import FaultError, refuse

MAX_DEPTH = 2500  # nested groups; the parser overflows an 8 MiB stack between 10,000 and 20,000
MAX_RULES = 5000  # left recursion is looked for by recursion over rules

Parses = Callable[[bytes], bool]

# Literals, character classes and comments: parentheses inside them do not nest.
_INERT = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\r\n]*', re.DOTALL)


def check_grammar(text: str, parses: Parses, field: str = "grammar") -> None:
    """Refuse a grammar that is malformed or too deep.

    Args:
        parses: llama.cpp's own parser: whether the grammar has a sampler.
        field: name of the request's field.

    Raises:
        FaultError: `invalid_parameter`.
    """
    if not text.strip():
        raise _bad(field, "it is empty")
    if "\0" in text:
        raise _bad(field, "it holds a NUL character")
    bare = _INERT.sub("", text)
    if bracket_depth(bare) > MAX_DEPTH:
        raise _bad(field, f"its groups are nested deeper than {MAX_DEPTH}")
    if bare.count("::=") > MAX_RULES:
        raise _bad(field, f"it has more than {MAX_RULES} rules")
    if not parses(text.encode()):
        raise _bad(
            field,
            "llama.cpp cannot parse it as GBNF; it needs a rule named root, only defined rules, "
            "closed groups and no left recursion",
        )


def bracket_depth(text: str) -> int:
    """Deepest nesting of round brackets."""
    deepest = level = 0
    for bracket in re.findall(r"[()]", text):
        level = level + 1 if bracket == "(" else max(0, level - 1)
        deepest = max(deepest, level)
    return deepest


def _bad(field: str, reason: str) -> FaultError:
    return refuse("invalid_parameter", f"{field}: {reason}.", field)


class NativeParser:
    """llama.cpp's grammar parser through its C interface, without a model.

    Without a vocabulary a grammar that names tokens (`<think>`) cannot be judged and is refused.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        """Take a loaded C library that exports llama.cpp's functions."""
        # Prototypes of our own: llama-cpp-python's attributes of the same library must keep theirs.
        init = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p)
        free = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        self._init = init(("llama_sampler_init_grammar", library))
        self._free = free(("llama_sampler_free", library))

    def __call__(self, grammar: bytes) -> bool:
        """Whether the grammar has a sampler."""
        sampler = self._init(None, grammar, b"root")
        if not sampler:
            return False
        self._free(sampler)
        return True
