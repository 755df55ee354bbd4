from __future__ import annotations

import os
import re
import time
from pathlib import Path

from protocol.work import USAGE_KEYS
from supervisor.observe.metrics_table import COUNTED, PREFIX
from supervisor.observe.tally import _USAGE, Tally


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def everything(tmp_path: Path, clock: Clock) -> Tally:
    tally = Tally(
        models=["m"],
        engines=["e"],
        places={"state": tmp_path},
        cache_bytes=lambda: 7,
        log_lines=lambda: {"info": 3},
        log_dropped=lambda: {"file": 1},
        clock=clock,
    )
    tally.declined("busy")
    tally.session_opened()
    tally.session_opened()
    tally.transferred("in", 10)
    tally.phase("llm", "run", 1.5)
    tally.first_output("llm", "m", 0.2)
    tally.token_pace("m", 0.02)
    tally.ended("llm", "m", "failed", "engine_hung")
    tally.used("m", dict.fromkeys(USAGE_KEYS, 2))
    tally.loaded("e", 3)
    tally.escalated("e", "SIGKILL")
    tally.paced("m", 0.2)
    tally.spilled("m", 3)
    tally.reloaded("applied")
    return tally


def test_every_family_of_the_table_has_a_caller(tmp_path: Path) -> None:
    clock = Clock()
    tally = everything(tmp_path, clock)
    clock.now += 2
    lines = tally.lines()
    shown = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    assert shown == {PREFIX + metric.name for metric in COUNTED}
    assert "bulkhead_reconnects_total 1" in lines
    assert "bulkhead_heartbeat_age_seconds 2" in lines
    assert 'bulkhead_jobs_total{kind="llm",model="m",outcome="failed"} 1' in lines
    assert 'bulkhead_tokens_total{model="m",direction="output"} 2' in lines
    assert 'bulkhead_log_lines_total{level="info"} 3' in lines
    disk = os.statvfs(tmp_path)
    assert f'bulkhead_disk_size_bytes{{place="state"}} {disk.f_blocks * disk.f_frsize}' in lines
    line = re.compile(r'bulkhead_[a-z_]+(\{[a-z]+="[^"\n]*"(,[a-z]+="[^"\n]*")*\})? [0-9.e+-]+\Z')
    assert [each for each in lines if not each.startswith("#") and not line.match(each)] == []


def test_what_is_not_known_has_no_line(tmp_path: Path) -> None:
    lines = "\n".join(Tally(places={"state": tmp_path / "gone"}).lines())
    for name in ("heartbeat_age", "disk_free", "model_cache", "reconnects_total 1"):
        assert name not in lines


def test_codes_that_engines_make_up_are_one_series() -> None:
    tally = Tally()
    for n in range(100):
        tally.ended("llm", "m", "failed", f"made_up_{n}")
        tally.declined(f"made_up_{n}")
    faults = [line for line in tally.lines() if line.startswith("bulkhead_job_faults_total")]
    assert faults == ['bulkhead_job_faults_total{kind="llm",model="m",code="other"} 100']


def test_usage_that_is_counted_exists_in_the_protocol() -> None:
    assert set(_USAGE) <= set(USAGE_KEYS)


def test_a_scrape_is_quick(tmp_path: Path) -> None:
    tally = everything(tmp_path, Clock())
    for model in range(60):
        for kind in ("llm", "image", "audio_stt"):
            tally.first_output(kind, f"m{model}", 0.1)
    began = time.process_time()
    for _ in range(10):
        tally.lines()
    assert (time.process_time() - began) / 10 < 1  # 0.01 on a quiet box
