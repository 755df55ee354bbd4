"""The processes of a child: which of them the engine is, who belongs to it, and how much memory they hold.

An engine is not the process that we started. That one is the warden; below it stands the first process of a pid
namespace or, without one, the guard; and below that the engine.
"""

from __future__ import annotations

from supervisor.host import procfs

_DEPTH = 3  # warden, guard, engine
# A fork bomb inside the namespace must not make us walk for seconds.
_MAX_MEMBERS = 4096


def speaks_for(leader: int, told: int) -> bool:
    """Whether `told` is, in its own pid namespace, the pid of the child `leader` or of a process that it started.

    A confined engine is not the process that we started but one below it, and sees itself under another number.
    Where there is no /proc, only the leader itself will do.
    """
    return leader == told or _told_by(leader, told) is not None


def engine_pid(leader: int, told: int | None = None) -> int:
    """The host's number of the engine process of the child `leader`.

    Args:
        leader: pid of the child that we started.
        told: the pid that the engine gave in its hello. Without it the child is taken to have a warden.

    Returns:
        `leader` itself where nothing below it can be seen: no warden, not forked yet, no /proc, gone.
    """
    if told is not None and (found := _told_by(leader, told)) is not None:
        return found
    guards = procfs.children(leader)
    engines = procfs.children(guards[0]) if guards else []
    return engines[0] if engines else leader  # orphans that the guard adopted come after its own child


def members(leader: int) -> list[int]:
    """Every living process below and including `leader`, at most 4096 of them; [] when it is gone."""
    if procfs.stat(leader) is None:
        return []
    found, seen = [leader], {leader}
    for pid in found:  # grows while we walk
        if len(found) >= _MAX_MEMBERS:
            break
        new = [child for child in procfs.children(pid) if child not in seen]
        seen.update(new)
        found += new
    return found[:_MAX_MEMBERS]


def rss_bytes(leader: int) -> int:
    """Resident memory of the whole family, in bytes; 0 when it is gone.

    Shared pages (weights that are mapped, shared memory) are counted once, as much as the process with the most of
    them has: processes of one engine map the same files. The exact share of each would be in smaps_rollup, which
    takes the lock of a process that may hang.
    """
    sizes = [procfs.resident_bytes(pid) for pid in members(leader)]
    alone = sum(resident - shared for resident, shared in sizes)
    return alone + max((shared for _, shared in sizes), default=0)


def _told_by(leader: int, told: int) -> int | None:
    generation = [leader]
    for _ in range(_DEPTH):
        for pid in generation:
            if procfs.own_number(pid) == told:
                return pid
        generation = [child for pid in generation for child in procfs.children(pid)]
    return None
