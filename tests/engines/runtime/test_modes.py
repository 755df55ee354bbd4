"""probe, describe and check, as the supervisor's probe runs them."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from engines.runtime.modes import engine_class
from protocol.work import LlmResult

ROOT = Path(__file__).parents[3]
BOOT = ROOT / "engines" / "runtime" / "boot.py"
SYNTHETIC = "engines.synthetic.engine"


def _mode(*args, module=SYNTHETIC, stdin=b""):  # noqa: ANN002
    done = subprocess.run(
        [sys.executable, "-I", str(BOOT), str(ROOT), module, *args], input=stdin, capture_output=True, timeout=60
    )
    return [json.loads(line) for line in done.stdout.splitlines()], done


def test_probe_climbs_to_the_answer():
    lines, done = _mode("probe")
    assert [line["rung"] for line in lines] == ["import", "claims", "load", "infer", "answer"]
    assert lines[-1]["wrong"] == ""
    assert lines[-1]["rss_bytes"] > 0
    assert lines[3]["ready"]["device"] == "cpu"
    assert done.returncode == 0


def test_probe_of_a_device_that_is_not_there_is_a_fallback():
    lines, _ = _mode("probe", "--device", "cuda")
    assert lines[-1]["rung"] == "fault"
    assert lines[-1]["fault"]["code"] == "cpu_fallback"


def test_probe_of_a_module_that_is_not_there():
    lines, _ = _mode("probe", module="no_such_package.engine")
    assert lines[-1]["fault"]["code"] == "not_installed"


def test_describe_and_check_agree():
    ((told,), _) = _mode("describe")
    assert told["name"] == "synthetic"
    assert told["cases"][0]["kind"] == "llm"
    assert told["endless"]["params"]["max_tokens"] == 2000
    for content, right in (("one two three", True), ("one", False)):
        body = base64.b64encode(msgspec.msgpack.encode(LlmResult(content=content))).decode()
        asked = json.dumps({"case": 0, "body": body, "files": []}).encode()
        ((verdict,), _) = _mode("check", stdin=asked)
        assert (verdict["wrong"] == "") is right


def test_an_unknown_mode_is_told():
    lines, done = _mode("dance")
    assert lines == []
    assert b"unknown mode 'dance'" in done.stderr


def test_only_an_engine_is_an_engine():
    with pytest.raises(AttributeError):
        engine_class("json")
