"""The dashboard and the alerts name only metrics that exist, and every metric that exists is drawn."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engines.telemetry.nvml import CLOCK_REASONS
from supervisor.machine.gpu_metrics import gpu_metrics
from supervisor.machine.readings import GpuReading

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))
from dashboard_road import (  # noqa: E402
    ALERT_RULES,
    ALERTS,
    COORDINATOR_RULES,
    DASHBOARD,
    GROUPS,
    NOT_DRAWN,
    ROWS,
    alerts,
    dashboard,
    declared,
    families,
    series,
)

NAME = re.compile(r"bulkhead_[a-z0-9_]+")


def panels() -> list[dict[str, Any]]:
    found = json.loads(DASHBOARD.read_text())["panels"]
    return [each for panel in found for each in (panel, *panel.get("panels", ()))]


def queries() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel.get("targets", ())]


def test_the_files_are_what_the_tables_say() -> None:
    assert DASHBOARD.read_text() == dashboard(), "run scripts/dashboard"
    assert ALERTS.read_text() == alerts(), "run scripts/dashboard"


def test_queries_name_only_what_exists_and_everything_is_drawn() -> None:
    known = series(families())
    text = queries() + [rule.expr for rule in (*ALERT_RULES, *COORDINATOR_RULES)]
    named = {name for query in text for name in NAME.findall(query)}
    assert named - known == set()
    assert known - named - NOT_DRAWN - {n for n in known if n.endswith(("_sum", "_count"))} == set()
    assert NOT_DRAWN <= known


def test_rows_are_the_five_and_panels_do_not_overlap() -> None:
    assert [panel["title"] for panel in panels() if panel["type"] == "row"] == list(ROWS)
    numbers = [panel["id"] for panel in panels()]
    assert len(numbers) == len(set(numbers))
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels()]
    assert len(places) == len(set(places))
    assert all(panel["title"] and panel["targets"] for panel in panels() if panel["type"] != "row")


def test_queries_are_balanced() -> None:
    for query in [*queries(), *(rule.expr for rule in (*ALERT_RULES, *COORDINATOR_RULES))]:
        for one, other in ("()", "{}", "[]"):
            assert query.count(one) == query.count(other), query
        assert query.count('"') % 2 == 0


def test_a_power_cap_is_no_alert_under_the_name_that_the_gpu_reader_gives_it() -> None:
    [rule] = [rule for rule in ALERT_RULES if rule.name == "BulkheadGpuThrottled"]
    assert re.findall(r'reason!="([^"]+)"', rule.expr) == [CLOCK_REASONS[0x4]]


def test_the_alerts_are_valid_yaml_in_groups_of_workers_and_coordinators() -> None:
    yaml = pytest.importorskip("yaml")
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    assert [(group["name"], len(group["rules"])) for group in groups] == [("bulkhead", 7), ("bulkhead-coordinator", 9)]
    for group, (_name, rules) in zip(groups, GROUPS, strict=True):
        assert [rule["alert"] for rule in group["rules"]] == [rule.name for rule in rules]
        for rule, made in zip(group["rules"], rules, strict=True):
            assert rule["expr"] == made.expr
            assert rule["for"] == made.for_
            assert rule["labels"]["severity"] in ("warning", "critical")


def test_families_that_are_read_from_source_are_those_that_are_told() -> None:
    uuid = "GPU-1"
    reading = GpuReading(uuid=uuid, index=0, name="x", clock_reasons=("sw-thermal-slowdown",))
    text = gpu_metrics({uuid: reading}, age_s=1.0, faults={(uuid, "xid 79"): 1})
    told = {line.split()[2] for line in text if line.startswith("# TYPE")}
    assert told <= {family.name for family in families()}
    assert {f"bulkhead_gpu_{name}" for name, _kind, _help in declared(ROOT / "supervisor/machine/gpu_metrics.py")} >= {
        "bulkhead_gpu_throttled",
        "bulkhead_gpu_faults_total",
        "bulkhead_gpu_reading_age_seconds",
    }


def test_the_coordinators_families_are_all_found(tmp_path: Path) -> None:
    source = (ROOT / "coordinator/metrics.py").read_text()
    found = {name for name, _kind, _help in declared(ROOT / "coordinator/metrics.py")}
    # `sample("name", …` is how a value is told; every such name has to be declared.
    assert set(re.findall(r'sample\("([a-z_]+)"', source)) <= found
    assert {"worker_accepting", "worker_slots", "jobs_waiting", "http_requests_total"} <= found


def test_a_stale_file_is_noticed(tmp_path: Path) -> None:
    road = (ROOT / "scripts/dashboard_road.py").read_text()
    changed = tmp_path / "scripts"
    changed.mkdir()
    for folder in ("supervisor", "coordinator", "protocol", "engines"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (changed / "dashboard_road.py").write_text(road)
    command = [sys.executable, str(changed / "dashboard_road.py")]
    assert subprocess.run([*command, "--check"], capture_output=True, check=False).returncode == 1
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert subprocess.run([*command, "--check"], capture_output=True, check=False).returncode == 0
    assert (tmp_path / "deploy/grafana/bulkhead.json").read_text() == DASHBOARD.read_text()
