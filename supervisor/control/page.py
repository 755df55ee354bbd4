"""What `supervisor status` prints: holds first, then models, GPUs, and what went wrong lately. Pure.

Each part is a page of its own, too: `supervisor holds`, `engines`, `gpus`. Everything takes answers of the control API
as decoded from JSON, and a supervisor of another version may leave out what it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from supervisor.control.commands.layout import (
    Paper,
    Row,
    ago,
    count,
    gib,
    joined,
    now_of,
    plain,
    span,
    table,
    until,
    wrapped,
)

_WIDEST = 160  # of a sentence in a table; `--json` has all of it
_ID = 12  # characters of a UUID that tell GPUs apart, in any box so far: "GPU-8f6b1c2d"


def page(seen: Mapping[str, Any], paper: Paper) -> str:
    """Lay out a snapshot."""
    now = now_of(seen)
    parts = [head(seen, paper)]
    if seen["holds"]:
        parts.append(holds(seen["holds"], now, paper))
    parts += ahead(seen, paper)
    parts.append(models(seen["models"], paper))
    parts.append(gpus(seen["gpus"], seen["gpu_reason"], paper))
    if seen["incidents"]:
        parts.append(incidents(seen["incidents"], paper))
    return "\n\n".join(parts)


def head(seen: Mapping[str, Any], paper: Paper) -> str:
    """The worker in two lines: what it does and why, then which one it is."""
    link = seen["link"]
    where = f" of {link['url']}" if link["url"] else ""
    text = f"{seen['worker'] or 'worker'}{where}: {seen['state']}. {_sentence(seen['why'])}".rstrip()
    lines = wrapped(text, paper)
    lines[0] = lines[0].replace(f": {seen['state']}.", f": {paper.state(seen['state'])}.", 1)
    facts = [f"supervisor {seen['version']}", f"pid {seen['pid']}", f"up {span(seen['uptime_s'])}"]
    facts.append(count(seen["jobs"], "job"))
    if seen.get("drain_until"):
        facts.append(f"what still runs is ended {until(seen['drain_until'], now_of(seen), '')}")
    return "\n".join([*lines, *wrapped(joined(facts), paper)])


def holds(items: Sequence[Mapping[str, Any]], now: float, paper: Paper) -> str:
    """The reasons for not taking work."""
    if not items:
        return "Nothing holds this worker."
    rows = [
        Row(
            [
                hold["source"],
                joined([hold.get("kind", ""), gpu_id(hold.get("gpu", ""), paper)]) or "everything",
                hold["mode"],
                ago(hold["since"], now),
                until(hold["until"], now, "resume" if hold["source"] == "operator" else "lifted"),
            ],
            _sentence(hold["reason"]),
        )
        for hold in items
    ]
    return table(("HOLD", "OF", "MODE", "SINCE", "UNTIL"), rows, paper, why="REASON")


def ahead(seen: Mapping[str, Any], paper: Paper) -> list[str]:
    """What will hold it before long, and which rules cannot see."""
    coming = [f"Coming {until(one['at'], now_of(seen), '')}: {one['text']}" for one in seen.get("coming", ())]
    blind = [f"Not known: {one['text']}" for one in seen.get("sights", ()) if one["unknown"]]
    lines = [line for text in (*coming, *blind) for line in wrapped(f"{_sentence(text)}.", paper)]
    return ["\n".join(lines)] if lines else []


def models(items: Sequence[Mapping[str, Any]], paper: Paper) -> str:
    """Models and what their engines do."""
    if not items:
        return "No model is configured."
    rows = []
    for model in items:
        idle = model["idle_s"]
        state = f"{model['state']} {span(idle)}" if idle is not None else model["state"]
        jobs = f"{model['running']}/{model['slots']}" + (f" +{model['queued']}" if model["queued"] else "")
        held = "; ".join(f"no {kind} jobs: {why}" for kind, why in model.get("held_kinds", {}).items())
        past = "" if model["pid"] else model["last_end"]  # of one that lives again it is no answer to any question
        known = (model["waits"], held, model.get("slow"), model["reason"], model.get("unserved"), past)
        why = next(filter(None, known), "")
        cells = [model["name"], state, model["device"], jobs, gib(model["rss_bytes"]), gib(model["vram_bytes"])]
        rows.append(Row(cells, _sentence(why)))
    return table(("MODEL", "STATE", "DEVICE", "JOBS", "MEMORY", "GPU MEMORY"), rows, paper, right=(4, 5), state=1)


def gpus(items: Sequence[Mapping[str, Any]], reason: str, paper: Paper) -> str:
    """GPUs and why they are idle; `reason` when nothing is known of any."""
    if not items:
        return "\n".join(wrapped(reason or "There is no GPU.", paper))
    rows = []
    for gpu in items:
        sizes = [gib(gpu[name]) for name in ("free_bytes", "total_bytes", "ours_bytes", "foreign_bytes")]
        cells = [
            gpu_id(gpu["uuid"], paper),
            gpu["name"],
            *sizes,
            _share(gpu["busy"]),
            _unit(gpu["temperature_c"], "°C"),
        ]
        why = " ".join(part for part in (gpu["why"], gpu["tainted"]) if part)
        rows.append(Row(cells, _sentence(why)))
    titles = ("GPU", "NAME", "FREE", "TOTAL", "OURS", "OTHERS", "BUSY", "TEMP")
    return table(titles, rows, paper, why="WHY IDLE", right=(2, 3, 4, 5, 6, 7), whole=(0,))


def incidents(items: Sequence[Mapping[str, Any]], paper: Paper) -> str:
    """The latest bad ends of engines."""
    if not items:
        return "No engine has ended badly."
    rows = [
        Row([one["time"][:19], one["model"], one["code"]], _sentence(one["message"] or one["how"])) for one in items
    ]
    return table(("LAST INCIDENTS", "MODEL", "FAULT"), rows, paper, why="WHAT HAPPENED")


def gpu_id(uuid: str, paper: Paper) -> str:
    """A UUID, as much of it as a terminal has room for; every command takes the short form, too."""
    return uuid if paper.width is None or paper.width >= 160 or len(uuid) <= _ID + 4 else uuid[:_ID]


def _share(busy: float | None) -> str:
    return "" if busy is None else f"{busy:.0%}"


def _unit(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:.0f}{unit}"


def _sentence(text: str) -> str:
    return plain(text, _WIDEST)
