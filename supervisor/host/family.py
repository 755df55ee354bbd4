"""Which process of a child's family is meant by a pid that the child told."""

from __future__ import annotations

from pathlib import Path

_DEPTH = 3  # warden, first process of the namespace, engine


def speaks_for(leader: int, told: int) -> bool:
    """Whether `told` is, in its own pid namespace, the pid of the child `leader` or of a process that it started.

    A confined engine is not the process that we started but one below it, and sees itself under another number.
    Where there is no /proc, only the leader itself will do.
    """
    generation = [leader]
    for _ in range(_DEPTH):
        if any(_own_number(pid) == told for pid in generation):
            return True
        generation = [child for pid in generation for child in _children(pid)]
    return leader == told


def _own_number(pid: int) -> int | None:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[-1]) for line in lines if line.startswith("NSpid:")), None)


def _children(pid: int) -> list[int]:
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(word) for word in file.read_text().split()]
        except OSError:
            continue
    return found
