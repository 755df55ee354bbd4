"""The page that `supervisor status` prints: holds first, then models, GPUs, and what went wrong lately. Pure."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from supervisor.columns import columns

_GIB = 2**30
_WIDEST = 160  # of a sentence in a table; `--json` has all of it


def page(seen: Mapping[str, Any]) -> str:
    """Lay out a snapshot, as decoded from JSON."""
    parts = [_head(seen), *_holds(seen), _models(seen), _gpus(seen), *_incidents(seen)]
    return "\n\n".join(part for part in parts if part)


def _head(seen: Mapping[str, Any]) -> str:
    link = seen["link"]
    where = f" of {link['url']}" if link["url"] else ""
    lines = [f"{seen['worker'] or 'worker'}{where}: {seen['state']}. {_sentence(seen['why'])}".rstrip()]
    lines.append(f"supervisor {seen['version']}, pid {seen['pid']}, up {span(seen['uptime_s'])}, {seen['jobs']} jobs")
    return "\n".join(lines)


def _holds(seen: Mapping[str, Any]) -> list[str]:
    if not seen["holds"]:
        return []
    rows = [
        [hold["source"], hold["mode"], _clock(hold["since"]), _until(hold["until"]), _sentence(hold["reason"])]
        for hold in seen["holds"]
    ]
    return [columns(("HOLD", "MODE", "SINCE", "UNTIL", "REASON"), rows)]


def _until(until: float | None) -> str:
    return "resume" if until is None else _clock(until)


def _models(seen: Mapping[str, Any]) -> str:
    if not seen["models"]:
        return "No model is configured."
    rows = []
    for model in seen["models"]:
        state = f"{model['state']} {span(model['idle_s'])}" if model["idle_s"] is not None else model["state"]
        jobs = f"{model['running']}/{model['slots']}" + (f" +{model['queued']}" if model["queued"] else "")
        why = _sentence(model["waits"] or model["reason"] or model["last_end"])
        rows.append([model["name"], state, model["device"], jobs, _gib(model["rss_bytes"]), _gib(_vram(model)), why])
    return columns(("MODEL", "STATE", "DEVICE", "JOBS", "MEMORY", "GPU MEMORY", "WHY"), rows, right=(4, 5))


def _vram(model: Mapping[str, Any]) -> int:
    return int(model["vram_bytes"])


def _gpus(seen: Mapping[str, Any]) -> str:
    if not seen["gpus"]:
        return str(seen["gpu_reason"])
    rows = []
    for gpu in seen["gpus"]:
        busy = "" if gpu["busy"] is None else f"{gpu['busy']:.0%}"
        sizes = [gpu["free_bytes"], gpu["total_bytes"], gpu["ours_bytes"], gpu["foreign_bytes"]]
        rows.append([gpu["uuid"], gpu["name"], *map(_gib, sizes), busy, _why(gpu)])
    head = ("GPU", "NAME", "FREE", "TOTAL", "OURS", "OTHERS", "BUSY", "WHY IDLE")
    return columns(head, rows, right=(2, 3, 4, 5, 6))


def _why(gpu: Mapping[str, Any]) -> str:
    return _sentence(" ".join(part for part in (gpu["why"], gpu["tainted"]) if part))


def _incidents(seen: Mapping[str, Any]) -> list[str]:
    if not seen["incidents"]:
        return []
    rows = [
        [one["time"][:19], one["model"], one["code"], _sentence(one["message"] or one["how"])]
        for one in seen["incidents"]
    ]
    return [columns(("LAST INCIDENTS", "MODEL", "FAULT", "WHAT HAPPENED"), rows)]


# ---- words


def _sentence(text: str) -> str:
    """Fit for one line of a terminal: engines write what they like, escape sequences too."""
    plain = "".join(char if char.isprintable() else " " for char in text)
    return plain if len(plain) <= _WIDEST else f"{plain[: _WIDEST - 1]}…"


def span(seconds: float | None) -> str:
    """A length of time: 12s, 3m 04s, 1h 12m, 2d 03h."""
    if seconds is None:
        return ""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02}s"
    if whole < 86_400:
        return f"{whole // 3600}h {whole % 3600 // 60:02}m"
    return f"{whole // 86_400}d {whole % 86_400 // 3600:02}h"


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _gib(count: int | None) -> str:
    return "?" if count is None else f"{count / _GIB:.1f}G" if count else "-"
