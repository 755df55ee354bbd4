"""The launcher on Windows, as far as this system can play it: quoting, exit codes, and who runs what."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.lockdown import windows

ROOT = Path(__file__).parents[3]
# The platform is another one, `resource` is not there, and what would be started is told instead.
PLAYED = """
import sys
sys.path.insert(0, {root!r})
sys.modules["resource"] = None
sys.platform = "win32"
import json, os
def spawnve(mode, path, argv, environment):
    print(json.dumps([mode == os.P_WAIT, path, argv, environment]), flush=True)
    return {code}
os.spawnve = spawnve
from engines import launch
sys.argv = ["launch.py", json.dumps({spec!r})]
launch.main()
"""


def played(code: int = 0, **spec: object) -> subprocess.CompletedProcess[str]:
    whole = {"root": "C:/Program Files/bulkhead", "module": "m", "python": "C:/py/python.exe", "parent": 1, **spec}
    return subprocess.run(
        [sys.executable, "-c", PLAYED.format(root=str(ROOT), spec=whole, code=code)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_engine_is_started_and_waited_for(tmp_path: Path):
    done = played(7, sandbox={"mode": "best-effort"}, scratch=str(tmp_path), args=["serve"])
    assert done.returncode == 7, done.stderr
    waited, path, argv, environment = json.loads(done.stdout)
    assert waited
    assert path == "C:/py/python.exe"
    assert argv[1] == "-I"
    assert argv[3:] == ['"C:/Program Files/bulkhead"', "m", "serve"]
    assert {environment[name] for name in ("HOME", "TMPDIR", "USERPROFILE", "TEMP", "TMP")} == {str(tmp_path)}
    verdicts = json.loads(environment["BULKHEAD_SANDBOX"])
    assert set(verdicts.values()) == {"unavailable(win32)"}
    assert {"landlock", "seccomp", "net"} <= set(verdicts)


def test_a_sandbox_that_is_off_is_told_as_off():
    done = played(sandbox={"mode": "off"})
    verdicts = json.loads(json.loads(done.stdout)[3]["BULKHEAD_SANDBOX"])
    assert set(verdicts.values()) == {"off"}


def test_a_required_sandbox_starts_no_engine():
    done = played(sandbox={"mode": "require"})
    assert (done.returncode, done.stdout) == (71, "")
    assert "landlock is unavailable(win32)" in done.stderr


def test_a_crash_keeps_its_status():
    """os._exit takes a signed number; the status comes back as the unsigned one that Windows means."""
    assert windows.exit_code(0xC0000005) == -1073741819
    assert windows.exit_code(-1073741819) == -1073741819
    assert windows.exit_code(3) == 3
    assert played(0xC0000005, sandbox={}).returncode == 0x05  # of which this system keeps one byte


@given(st.text(st.sampled_from('ab "\t\\'), max_size=12))
def test_any_word_is_quoted_as_the_standard_library_does(word: str):
    assert windows.quoted(word) == subprocess.list2cmdline([word])


@pytest.mark.parametrize(
    "word",
    ["plain", "", "a b", 'say "hi"', "C:\\dir\\", "C:\\a dir\\", 'a\\"b', "tab\there", '\\\\host\\share "x"\\\\'],
)
def test_words_are_quoted_as_the_standard_library_does(word: str):
    assert windows.quoted(word) == subprocess.list2cmdline([word])
