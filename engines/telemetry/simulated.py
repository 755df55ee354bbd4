"""A GPU reader without a GPU: the lines of reader.py, from a script and from what engines say they hold.

    python -I simulated.py --script FILE [--allocations FOLDER] [--interval SECONDS]

It drives the tests and `supervisor selftest`, and lets anybody see two models that do not fit together on a machine
without a GPU. It keeps the whole contract of line.py (questions, leash, whole lines), so that whoever reads it
cannot tell.

FILE is JSON and may be replaced at any time (write a new one and rename it); every key is optional:

    {"driver": "simulated",
     "gpus": [{"uuid": "GPU-sim-0", "memory_total_bytes": 8589934592,
               "memory_reserved_bytes": 0,         held by the driver
               "memory_used_bytes": 0,             held by somebody whose process is not listed
               "processes": [{"pid": 41, "bytes": 1048576}],
               …}],                                any other field of a reading, as it is
     "events": [{"kind": "xid", "uuid": "GPU-sim-0", "xid": 79}],     each sent once, when it appears
     "mood": ""}                                   or one of MOODS

FOLDER is where engines keep their scratch (the supervisor's `instances`). An engine that plays at holding GPU memory
writes `vram.json` into its scratch: {"uuid": "GPU-sim-0", "bytes": 4294967296, "delay_s": 0.5}. Without "uuid" the
first GPU is meant. The memory counts as used while the file exists, and `delay_s` longer (a driver that returns
memory late). The file goes with the scratch, which is removed after the process has ended. The process is listed
with the memory when it can be found by its working folder; otherwise its memory is simply used, as in a container
that hides pids.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MOODS = {
    "hang": "says nothing more, like a reader whose driver hangs",
    "stubborn": "hangs, and ignores SIGTERM",
    "die": "ends with exit code 3",
    "garbage": "writes lines that are no readings between its readings",
    "nonsense": "writes only such lines",
    "flood": "writes one endless line",
    "none": "says that there is no GPU, and ends",
}
ALLOCATION = "vram.json"
_DEPTH = 4  # folders below FOLDER that are looked into
LOOK_S = 0.02  # between looks at the script
_GIB = 2**30
_GARBAGE = b'\xff\xfe{"t": "reading", "gpus": 7}\n{"t": "rea\n[]\n\n{"t": "reading", "gpus": [{"uuid": 1}]}\n'


class Allocations:
    """What the files below one folder hold, and for how long after they went."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._held: dict[str, dict[str, Any]] = {}
        self._gone: dict[str, float] = {}
        self._pids: dict[str, int] = {}

    def look(self, now: float) -> list[dict[str, Any]]:
        """Allocations at `now` (any clock, in seconds)."""
        found = dict(self._files())
        for path in set(self._held) - set(found):
            self._gone.setdefault(path, now)
            if now - self._gone[path] >= float(self._held[path].get("delay_s", 0.0)):
                del self._held[path], self._gone[path]
                self._pids.pop(path, None)
        for path, held in found.items():
            self._gone.pop(path, None)
            self._held[path] = held
            self._find_process(path)
        return [
            held | ({"pid": self._pids[path]} if path in self._pids and path not in self._gone else {})
            for path, held in self._held.items()
        ]

    def _files(self) -> Iterator[tuple[str, dict[str, Any]]]:
        if not self._folder:
            return
        for depth in range(_DEPTH + 1):
            for path in Path(self._folder).glob("*/" * depth + ALLOCATION):
                try:
                    held = json.loads(path.read_bytes())
                except (OSError, ValueError):
                    continue  # gone, or half written: the next look has it
                if isinstance(held, dict) and isinstance(held.get("bytes"), int):
                    yield str(path), held

    def _find_process(self, path: str) -> None:
        pid, scratch = self._pids.get(path), os.path.dirname(path)
        if pid is not None and _works_in(pid, scratch):
            return
        self._pids.pop(path, None)
        if sys.platform == "linux":
            pids = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
            if (pid := next((pid for pid in pids if _works_in(pid, scratch)), None)) is not None:
                self._pids[path] = pid


def _works_in(pid: int, folder: str) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/cwd") == folder
    except OSError:
        return False


class Script:
    """The script file, read again when it changes."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self.now: dict[str, Any] = {}
        self._events_sent = 0

    def changed(self) -> bool:
        """Look; True when there is something new. A broken script leaves the last one in force."""
        try:
            stat = os.stat(self._path)
            seen = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            if seen == self._seen:
                return False
            new = json.loads(Path(self._path).read_bytes())
        except (OSError, ValueError):
            return False
        if not isinstance(new, dict):
            return False
        self._seen, self.now = seen, new
        return True

    def new_events(self) -> list[dict[str, Any]]:
        """Events that have not been sent yet; a list that became shorter starts anew."""
        events = self.now.get("events", [])
        if len(events) < self._events_sent:
            self._events_sent = 0
        new, self._events_sent = events[self._events_sent :], len(events)
        return list(new)


def reading(script: dict[str, Any], held: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The GPUs of a script with allocations added to what the script says."""
    gpus = []
    for index, given in enumerate(script.get("gpus", [])):
        gpu = {"index": index, "minor": index, "uuid": f"GPU-sim-{index}", "name": "Simulated GPU", **given}
        total = gpu.setdefault("memory_total_bytes", 8 * _GIB)
        reserved = gpu.setdefault("memory_reserved_bytes", 0)
        processes = [{"kind": "compute", **one} for one in gpu.get("processes", [])]
        mine = [one for one in held if one.get("uuid", gpu["uuid"] if index == 0 else "") == gpu["uuid"]]
        processes += [
            {"kind": "compute", "pid": one["pid"], "bytes": one["bytes"]} for one in mine if one.get("pid") is not None
        ]
        hidden = sum(one["bytes"] for one in mine if one.get("pid") is None)
        used = gpu.get("memory_used_bytes", 0) + hidden + sum(one.get("bytes", 0) for one in processes)
        used = min(used, total - reserved)
        gpu |= {"memory_used_bytes": used, "memory_free_bytes": total - reserved - used, "processes": processes}
        gpus.append(gpu)
    return gpus


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--script", required=True)
    parser.add_argument("--allocations", default="")
    parser.add_argument("--interval", type=float, default=1.0)
    args = parser.parse_args()
    from engines.telemetry import line as lines

    lines.die_with_parent()
    line = lines.take_line()
    questions = lines.Questions()
    questions.listen()
    script, allocations = Script(args.script), Allocations(args.allocations)
    if not script.changed():
        script.now = {"mood": "none", "error": f"there is no script {args.script}"}
    asked = 0
    while True:
        began = time.monotonic()
        for event in script.new_events():
            line.send({"t": "event", **event})
        _be_moody(script.now, line)
        gpus = reading(script.now, allocations.look(began))
        about = {"driver": script.now.get("driver", "simulated"), "cuda": "13.0", "events": ""}
        line.send({"t": "reading", "asked": asked, **about, "gpus": gpus})
        latest = asked
        while latest == asked and not script.changed() and time.monotonic() < began + args.interval:
            latest = questions.wait(asked, LOOK_S)
        asked = latest
        time.sleep(max(0.0, began + LOOK_S - time.monotonic()))


def _be_moody(script: dict[str, Any], line: Any) -> None:
    mood = script.get("mood", "")
    if mood == "none" or (not mood and not script.get("gpus")):
        line.send({"t": "none", "error": script.get("error", "the script has no GPU")})
        os._exit(0)
    if mood == "die":
        os._exit(3)
    if mood == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while mood in ("hang", "stubborn"):
        time.sleep(3600)
    while mood == "flood":
        line.send_raw(b"x" * 65536)
    while mood in ("garbage", "nonsense"):
        line.send_raw(_GARBAGE)
        time.sleep(LOOK_S)
        if mood == "garbage":
            break


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    main()
