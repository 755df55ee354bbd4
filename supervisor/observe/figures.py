"""Numbers as people read them."""

from __future__ import annotations


def span(seconds: float) -> str:
    """A length of time for people: "0.004 s", "0.24 s", "3.2 s", "75 s"."""
    digits = 3 if seconds < 0.1 else 2 if seconds < 1 else 1 if seconds < 60 else 0
    return f"{seconds:.{digits}f} s"


def amount(count: int) -> str:
    """Bytes for people: "61 MiB", "4.1 GiB"."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{max(1, round(count / 2**20))} MiB"


def counted(number: int, one: str, many: str = "") -> str:
    """ "1 job", "2 jobs"; `many` where an s does not make it."""
    return f"{number} {one if number == 1 else many or one + 's'}"
