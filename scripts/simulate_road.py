"""Runs the scheduler on simulated GPUs and compares it with first come, first served. Started by scripts/simulate."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import msgspec
from simulate_fifo import Fifo
from simulate_trace import Trace, read, write
from simulate_world import Broken, Figures, World

from supervisor.intake.scheduler import Scheduler

TRACES = Path(__file__).parent / "traces"
SHIPPED = ("desktop", "mixed-rack", "hot-model")
EXAMPLES = """examples:
  scripts/simulate                          the three shipped traces
  scripts/simulate desktop --seed 7         another draw of one of them
  scripts/simulate hot-model --jobs 1000000 a million jobs
  scripts/simulate mine.jsonl --json        a trace of your own, for programs
  scripts/simulate desktop --write day.jsonl --jobs 1000
"""


def policy(name: str, trace: Trace) -> Any:
    """Make one of the policies that are compared."""
    if name == "bulkhead":
        return Scheduler(trace.plans(), trace.devices())
    return Fifo(trace.plans(), trace.devices(), strict=name == "fifo+lru")


POLICIES = ("bulkhead", "fifo+lru", "queues+lru")


def simulate(trace: Trace, names: tuple[str, ...], *, quiet: bool) -> list[Figures]:
    """Every policy on the same trace."""
    return [World(trace, policy(name, trace), name, quiet=quiet).run() for name in names]


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns 0; 1 when a policy broke a rule, 64 for wrong usage."""
    parser = argparse.ArgumentParser(
        prog="scripts/simulate", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("traces", nargs="*", help=f"{', '.join(SHIPPED)}, or a .toml or .jsonl file (all three)")
    parser.add_argument("--jobs", type=int, help="how many jobs to draw (what the trace says)")
    parser.add_argument("--seed", type=int, help="seed of the draw (what the trace says)")
    parser.add_argument("--only", choices=POLICIES, help="one policy, without the comparison")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the one trace as JSON lines and stop")
    parser.add_argument("--json", action="store_true", help="print an array of objects")
    args = parser.parse_args(argv)
    try:
        paths = [TRACES / f"{name}.toml" if name in SHIPPED else Path(name) for name in args.traces or SHIPPED]
        traces = [read(path, jobs=args.jobs, seed=args.seed) for path in paths]
    except (OSError, ValueError) as error:
        print(f"scripts/simulate: {error}", file=sys.stderr)
        return 64
    if args.write:
        if len(traces) != 1:
            print("scripts/simulate: --write takes one trace.", file=sys.stderr)
            return 64
        write(traces[0], args.write)
        return 0
    try:
        results = [(trace, simulate(trace, (args.only,) if args.only else POLICIES, quiet=False)) for trace in traces]
    except Broken as error:
        print(f"scripts/simulate: {error}", file=sys.stderr)
        return 1
    if args.json:
        rows = [
            {"trace": trace.name, "seed": trace.seed, **msgspec.to_builtins(figures)}
            for trace, found in results
            for figures in found
        ]
        print(json.dumps(rows, indent=1))
        return 0
    for trace, found in results:
        print(table(trace, found))
    return 0


def table(trace: Trace, found: list[Figures]) -> str:
    """One trace's figures for people."""
    lines = [
        f"## {trace.name}: {found[0].jobs:,} jobs, seed {trace.seed}. {trace.spec.about}",
        "| policy | GPUs busy | GPUs only loading | wait p50 | wait p99 | oldest wait | loads | evictions | refused "
        "| all done after | a step |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {each.policy} | {each.busy:.1%} | {each.loading:.1%} | {each.wait_p50_s:.1f} s | {each.wait_p99_s:.1f} s "
        f"| {each.wait_oldest_s:.0f} s | {each.loads} | {each.evictions} | {each.refused} "
        f"| {each.lasted_s / 3600:.2f} h | {each.decide_us:.1f} µs |"
        for each in found
    ]
    if len(found) > 1:
        ours = found[0]
        lines += [against(ours, other) for other in found[1:]]
    return "\n".join(lines) + "\n"


def against(ours: Figures, other: Figures) -> str:
    """By how much."""
    busy = (ours.busy - other.busy) * 100
    ratio = other.wait_p99_s / ours.wait_p99_s if ours.wait_p99_s else float("inf")
    text = f"Against {other.policy}: GPUs busy {busy:+.1f} points, wait p99 {ratio:.2f} times shorter."
    if other.lasted_s > 1.1 * ours.lasted_s:
        text += f" {other.policy} cannot keep up with this trace, so its waits only tell how long the trace is."
    return text


if __name__ == "__main__":
    sys.exit(main())
