"""The Grafana dashboard and the alert rules, made from the tables of metrics so that no name can drift.

Every family of the supervisor, of its GPUs and of the coordinator gets a panel, drawn by its kind: a counter as a rate,
a histogram as its median and 99th percentile, a gauge as it is. Families of the coordinator and the few of the GPUs
that are not in a table are read from the calls of `_family` in their source.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from coordinator.store.vitals import SLOW_TRANSACTION_S  # noqa: E402
from protocol.faults import CODES, Owner  # noqa: E402
from supervisor.machine.gpu_metrics import METRICS as GPU_METRICS  # noqa: E402
from supervisor.machine.gpu_metrics import PREFIX as GPU_PREFIX  # noqa: E402
from supervisor.observe.metrics_table import COUNTED, PREFIX, SHOWN  # noqa: E402

DASHBOARD = ROOT / "deploy/grafana/bulkhead.json"
ALERTS = ROOT / "deploy/prometheus/alerts.yml"
ROWS = ("Fleet", "Worker", "GPU", "Engines", "Jobs")
COORDINATOR_PREFIX = "bulkhead_coordinator_"
# Facts for other queries to join with; they draw no line.
NOT_DRAWN = {
    "bulkhead_info",
    "bulkhead_gpu_info",
    "bulkhead_start_time_seconds",
    "bulkhead_coordinator_start_time_seconds",
}
_OF_ENGINES = ("engine_", "kill_", "model_pace_", "model_spilled_")
_OF_JOBS = (
    "job", "time_", "tokens_", "audio_", "images_", "frames_", "characters_", "documents_", "declines_", "transfer_",
)  # fmt: skip
# Ends of names -> Grafana's word for the unit.
_UNITS = (
    ("bytes_per_second", "Bps"), ("seconds", "s"), ("bytes", "bytes"), ("ratio", "percentunit"), ("celsius", "celsius"),
    ("watts", "watt"), ("joules", "joule"), ("hertz", "hertz"),
)  # fmt: skip


class Family(NamedTuple):
    """One family of metrics, by its whole name."""

    name: str
    kind: str
    help: str
    labels: tuple[str, ...]
    row: str


def families() -> list[Family]:
    """All of them, in the order in which they are drawn."""
    found = [
        Family(COORDINATOR_PREFIX + name, kind, about, (), "Fleet")
        for name, kind, about in declared(ROOT / "coordinator/metrics.py")
    ]
    for metric in (*SHOWN, *COUNTED):
        row = (
            "Engines"
            if metric.name.startswith(_OF_ENGINES)
            else "Jobs"
            if metric.name.startswith(_OF_JOBS)
            else "Worker"
        )
        found.append(Family(PREFIX + metric.name, metric.kind, metric.help, metric.labels, row))
    found += [Family(GPU_PREFIX + each.name, each.kind, each.help, ("gpu",), "GPU") for each in GPU_METRICS]
    found += [
        Family(GPU_PREFIX + name, kind, about, (), "GPU")
        for name, kind, about in declared(ROOT / "supervisor/machine/gpu_metrics.py")
    ]
    return found


def declared(source: Path) -> list[tuple[str, str, str]]:
    """(name, kind, help) of every `_family("name", "kind", "help", …)` in a file, also of those in a loop over rows."""
    found = []
    tree = ast.parse(source.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "_family":
            words = [each.value if isinstance(each, ast.Constant) else None for each in node.args[:3]]
            if all(isinstance(word, str) for word in words):
                found.append((str(words[0]), str(words[1]), str(words[2])))
    for loop in (node for node in ast.walk(tree) if isinstance(node, ast.For)):
        found += _in_loop(loop)
    return found


def _in_loop(loop: ast.For) -> Iterator[tuple[str, str, str]]:
    """`for name, text, … in (("workers", "How many.", …), …): _family(name, "gauge", text)`"""
    if not isinstance(loop.iter, ast.Tuple):
        return
    rows = [[each.value for each in row.elts[:2] if isinstance(each, ast.Constant)] for row in _tuples(loop.iter)]
    for node in (each for part in loop.body for each in ast.walk(part)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id != "_family":
            continue
        name, kind = node.args[:2]
        if isinstance(name, ast.Name) and isinstance(kind, ast.Constant):
            for row in rows:
                yield str(row[0]), str(kind.value), str(row[1])


def _tuples(node: ast.Tuple) -> list[ast.Tuple]:
    return [each for each in node.elts if isinstance(each, ast.Tuple)]


def series(all_families: list[Family]) -> set[str]:
    """Every name that may stand in a query."""
    names: set[str] = set()
    for family in all_families:
        ends = ("_bucket", "_sum", "_count") if family.kind == "histogram" else ("",)
        names |= {family.name + end for end in ends}
    return names


# ---- panels


def targets(family: Family) -> list[dict[str, str]]:
    """The queries of a panel."""
    chosen = "" if family.row == "Fleet" else '{instance=~"$worker"}'
    legend = " ".join(f"{{{{{label}}}}}" for label in (*family.labels, "instance"))
    if family.kind == "histogram":
        by = ", ".join(("le", *family.labels))
        words = " ".join(f"{{{{{label}}}}}" for label in family.labels)
        rates = f"sum by ({by}) (rate({family.name}_bucket{chosen}[$__rate_interval]))"
        return [
            {
                "expr": f"histogram_quantile({share}, {rates})",
                "legendFormat": f"p{round(share * 100)} {words}".strip(),
                "refId": reference,
            }
            for reference, share in (("A", 0.5), ("B", 0.99))
        ]
    expr = f"{family.name}{chosen}"
    if family.kind == "counter":
        expr = f"rate({expr}[$__rate_interval])"
    return [
        {"expr": expr, "legendFormat": "__auto" if family.row == "Fleet" or not family.labels else legend, "refId": "A"}
    ]


def unit(family: Family) -> str:
    """Grafana's word for the unit of what is drawn."""
    bare = family.name.removesuffix("_total")
    found = next((word for end, word in _UNITS if bare.endswith(end)), "")
    if family.kind != "counter":
        return found or "short"
    # The rate of seconds is a share, of bytes a speed, of joules a power.
    return {"s": "percentunit", "bytes": "Bps", "joule": "watt"}.get(found, "cps")


def panel(family: Family, number: int, x: int, y: int) -> dict[str, Any]:
    """One graph."""
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "id": number,
        "type": "timeseries",
        "title": family.help.rstrip("."),
        "description": family.name,
        "datasource": source,
        "gridPos": {"h": 7, "w": 8, "x": x, "y": y},
        "fieldConfig": {"defaults": {"unit": unit(family), "min": 0}, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [{**target, "datasource": source} for target in targets(family)],
    }


def variable(name: str, label: str, query: str) -> dict[str, Any]:
    """A choice at the top of the dashboard."""
    return {
        "name": name,
        "label": label,
        "type": "query",
        "query": query,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def dashboard() -> str:
    """bulkhead.json: one row for each of `ROWS`; all but the first are folded."""
    panels: list[dict[str, Any]] = []
    number = y = 0
    for row in ROWS:
        number += 1
        head: dict[str, Any] = {"id": number, "type": "row", "title": row, "collapsed": row != ROWS[0], "panels": []}
        head["gridPos"] = {"h": 1, "w": 24, "x": 0, "y": y}
        panels.append(head)
        y += 1
        drawn = [family for family in families() if family.row == row and family.name not in NOT_DRAWN]
        for place, family in enumerate(drawn):
            number += 1
            made = panel(family, number, 8 * (place % 3), y + 7 * (place // 3))
            (head["panels"] if head["collapsed"] else panels).append(made)
        y += 7 * -(-len(drawn) // 3)
    source = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    whole = {
        "uid": "bulkhead",
        "title": "Bulkhead",
        "tags": ["bulkhead"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [source, variable("worker", "Worker", f"label_values({PREFIX}up, instance)")]},
        "panels": panels,
    }
    return json.dumps(whole, indent=1) + "\n"


# ---- alerts


class Alert(NamedTuple):
    """One rule."""

    name: str
    expr: str
    for_: str
    severity: str
    summary: str


ALERT_RULES = (
    Alert(
        "BulkheadWorkerDown",
        'up{job="bulkhead"} == 0',
        "2m",
        "critical",
        "The supervisor on {{ $labels.instance }} does not answer.",
    ),
    Alert(
        "BulkheadEngineRestartLoop",
        f"increase({PREFIX}engine_restarts_total[15m]) > 3",
        "0m",
        "warning",
        "{{ $labels.model }} on {{ $labels.instance }} was started more than three times in 15 minutes.",
    ),
    Alert(
        "BulkheadGpuThrottled",
        # A power cap that is met under full load is what the cap is for.
        f'max by (instance, gpu, reason) ({GPU_PREFIX}throttled{{reason!="sw-power-cap"}}) > 0',
        "10m",
        "warning",
        "{{ $labels.gpu }} on {{ $labels.instance }} is slowed down: {{ $labels.reason }}.",
    ),
    Alert(
        "BulkheadGpuFault",
        # A counter that begins with 1 has not increased yet.
        f"increase({GPU_PREFIX}faults_total[10m]) > 0"
        f" or ({GPU_PREFIX}faults_total unless {GPU_PREFIX}faults_total offset 10m)",
        "0m",
        "critical",
        "The driver on {{ $labels.instance }} reported {{ $labels.fault }} for {{ $labels.gpu }}.",
    ),
    Alert(
        "BulkheadDiskNearlyFull",
        f"{PREFIX}disk_free_bytes / {PREFIX}disk_size_bytes < 0.1",
        "10m",
        "warning",
        "The disk of {{ $labels.place }} on {{ $labels.instance }} has less than a tenth left.",
    ),
    Alert(
        "BulkheadModelSlow",
        f"{PREFIX}model_pace_ratio < 0.25 or {PREFIX}model_spilled_bytes > 0",
        "10m",
        "warning",
        "{{ $labels.model }} on {{ $labels.instance }} runs far below its usual speed, or lies partly in RAM.",
    ),
    Alert(
        "BulkheadCoordinatorLost",
        f"{PREFIX}coordinator_connected == 0",
        "5m",
        "warning",
        "{{ $labels.instance }} has had no coordinator for five minutes.",
    ),
)

# Codes of faults that are the caller's own doing: such a job is no dead letter.
_CALLERS = "|".join(sorted(code for code, info in CODES.items() if info.owner is Owner.CALLER))

COORDINATOR_RULES = (
    Alert(
        "BulkheadCoordinatorDown",
        'up{job="bulkhead-coordinator"} == 0',
        "2m",
        "critical",
        "The coordinator on {{ $labels.instance }} does not answer.",
    ),
    Alert(
        "BulkheadStoreDown",
        f"{COORDINATOR_PREFIX}store_up == 0",
        "1m",
        "critical",
        "The store of {{ $labels.instance }} does not answer: new jobs are refused.",
    ),
    Alert(
        "BulkheadTransactionLong",
        f"{COORDINATOR_PREFIX}store_oldest_transaction_seconds > {SLOW_TRANSACTION_S:g}",
        "0m",
        "warning",
        "A transaction has been open in the store's database for {{ $value | humanizeDuration }}: claims slow down.",
    ),
    Alert(
        "BulkheadTransactionIdle",
        f"{COORDINATOR_PREFIX}store_idle_in_transaction_seconds > {SLOW_TRANSACTION_S:g}",
        "0m",
        "critical",
        "A session has held a transaction open for {{ $value | humanizeDuration }} and does nothing with it: end it.",
    ),
    Alert(
        "BulkheadQueueOld",
        # A batch may wait for a day; whoever runs batches raises this for their models.
        f"max by (kind, model) ({COORDINATOR_PREFIX}queue_oldest_seconds) > 900",
        "5m",
        "warning",
        "A job of {{ $labels.model }} has waited for {{ $value | humanizeDuration }}.",
    ),
    Alert(
        "BulkheadDeadLetters",
        f'sum by (model, code) (increase({COORDINATOR_PREFIX}job_faults_total{{code!~"{_CALLERS}"}}[15m])) > 5',
        "0m",
        "warning",
        "More than five jobs of {{ $labels.model }} failed for good in 15 minutes: {{ $labels.code }}.",
    ),
    Alert(
        "BulkheadCoordinatorDiskLow",
        f"{COORDINATOR_PREFIX}state_disk_free_bytes < 5e9",
        "5m",
        "critical",
        "The disk of the state folder on {{ $labels.instance }} has less than 5 GB left.",
    ),
    Alert(
        "BulkheadReplicaSilent",
        # What lasted: after an upgrade a replica's row of its former life is counted for a moment.
        f"max({COORDINATOR_PREFIX}store_replicas) < "
        f"max_over_time(min_over_time(max({COORDINATOR_PREFIX}store_replicas)[2m:15s])[1h:1m])",
        "5m",
        "warning",
        "Fewer replicas beat than an hour ago: {{ $value }}.",
    ),
    Alert(
        "BulkheadReplicaUnreached",
        f"{COORDINATOR_PREFIX}peers_connected < {COORDINATOR_PREFIX}peers",
        "5m",
        "warning",
        "{{ $labels.instance }} does not reach all other replicas: streams across them have gaps.",
    ),
)
GROUPS = (("bulkhead", ALERT_RULES), ("bulkhead-coordinator", COORDINATOR_RULES))


def alerts() -> str:
    """alerts.yml. JSON strings are YAML strings."""
    lines = ["# Made by scripts/dashboard. Scrape the workers under the job name `bulkhead`, coordinators under"]
    lines += ["# `bulkhead-coordinator`, with a key of theirs.", "groups:"]
    for group, rules in GROUPS:
        lines += [f"  - name: {group}", "    rules:"]
        for rule in rules:
            lines += [
                f"      - alert: {rule.name}",
                f"        expr: {json.dumps(rule.expr)}",
                f"        for: {rule.for_}",
                f"        labels: {{severity: {rule.severity}}}",
                f"        annotations: {{summary: {json.dumps(rule.summary)}}}",
            ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write both files, or say which is stale."""
    parser = argparse.ArgumentParser(description="Make the Grafana dashboard and the alert rules.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a file is stale")
    check = parser.parse_args().check
    stale = 0
    for path, text in ((DASHBOARD, dashboard()), (ALERTS, alerts())):
        if path.exists() and path.read_text() == text:
            continue
        if check:
            print(f"{path.relative_to(ROOT)} is stale: run scripts/dashboard", file=sys.stderr)
            stale = 1
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            print(f"wrote {path.relative_to(ROOT)}")
    return stale


if __name__ == "__main__":
    sys.exit(main())
