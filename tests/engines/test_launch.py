"""The launcher: what an engine child has, what it has not, and that it never outlives its parent."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.lockdown import start

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "engines" / "launch.py"
LINUX = sys.platform.startswith("linux")

# Stands in for boot.py: says what it finds and waits for the end of its input.
_REPORT = """
import json, os, resource, signal, sys
print(json.dumps({
    "env": dict(os.environ), "argv": sys.argv, "cwd": os.getcwd(), "isolated": sys.flags.isolated,
    "fds": [fd for fd in range(3, 256) if os.path.exists(f"/proc/self/fd/{fd}")],
    "core": resource.getrlimit(resource.RLIMIT_CORE), "nofile": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    "oom": open("/proc/self/oom_score_adj").read().strip() if os.path.exists("/proc/self/oom_score_adj") else "",
    "term": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
    "dump": signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN,
}), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def root(tmp_path):
    """An installation whose engine runtime is the report above."""
    boot = tmp_path / "root" / "engines" / "runtime" / "boot.py"
    boot.parent.mkdir(parents=True)
    boot.write_text(_REPORT)
    return tmp_path / "root"


def _argv(root, **spec):  # noqa: ANN003
    spec = {"root": str(root), "module": "some.engine", "python": sys.executable, **spec}
    return [sys.executable, "-I", "-S", str(LAUNCH), json.dumps(spec)]


def _report(root, *, env=None, pass_fds=(), **spec):  # noqa: ANN003
    done = subprocess.run(_argv(root, **spec), input=b"", capture_output=True, timeout=120, env=env, pass_fds=pass_fds)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_engine_runs_isolated_with_root_module_and_arguments(root):
    report = _report(root, args=["serve", "--json"])
    assert report["argv"][1:] == [str(root), "some.engine", "serve", "--json"]
    assert report["isolated"] == 1
    assert report["term"] is True
    assert report["dump"] is True


def test_the_environment_is_scrubbed(root, tmp_path):
    secrets = {"AWS_SECRET_ACCESS_KEY": "s", "LD_PRELOAD": "", "PYTHONPATH": "/x", "BULKHEAD_TOKEN": "t"}
    env = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", **secrets, "GRANTED": "yes"}
    report = _report(root, env=env, keep=["GRANTED"], scratch=str(tmp_path))
    found = report["env"]
    assert not set(secrets) & set(found)
    assert (found["GRANTED"], found["PATH"], found["LANG"]) == ("yes", env["PATH"], "C.UTF-8")
    assert (found["HOME"], found["TMPDIR"], report["cwd"]) == (str(tmp_path),) * 3
    assert (found["HF_HUB_OFFLINE"], found["GGML_NO_BACKTRACE"], found["PYTHONFAULTHANDLER"]) == ("1", "1", "1")
    assert found["OMP_WAIT_POLICY"] == "PASSIVE"


def test_granted_values_win_over_the_defaults(root):
    assert _report(root, env={"HF_HUB_OFFLINE": "0"}, keep=["HF_HUB_OFFLINE"])["env"]["HF_HUB_OFFLINE"] == "0"


@pytest.mark.skipif(not LINUX, reason="needs /proc")
def test_no_descriptor_but_the_pipes_is_inherited(root):
    read, write = os.pipe()
    try:
        assert _report(root, pass_fds=(read, write))["fds"] == []
    finally:
        os.close(read)
        os.close(write)


def test_no_core_files_and_the_limits_asked_for(root):
    report = _report(root, rlimits={"NOFILE": 77})
    assert report["core"] == [0, 0]
    assert report["nofile"] == 77


def test_a_limit_never_exceeds_the_ceiling(root):
    ceiling = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert _report(root, rlimits={"NOFILE": ceiling * 2})["nofile"] == ceiling


@pytest.mark.skipif(not LINUX, reason="oom_score_adj is Linux's")
def test_it_is_the_first_to_go_when_memory_runs_out(root):
    assert _report(root)["oom"] == "500"


@pytest.mark.skipif(not LINUX, reason="PDEATHSIG is Linux's")
def test_it_dies_with_its_parent(root):
    """The parent here is a process of its own that starts the child and is then killed."""
    code = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen({_argv(root)!r}, stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
        "print(child.pid, child.stdout.readline()[:1], flush=True)\ntime.sleep(100)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    pid = int(parent.stdout.readline().split()[0])
    pidfd = os.pidfd_open(pid)
    # Its input stays open through this descriptor, so only the signal can end it.
    held = os.open(f"/proc/{parent.pid}/fd", os.O_RDONLY)
    parent.kill()
    parent.wait(60)
    assert select.select([pidfd], [], [], 60)[0]
    for fd in (held, pidfd):
        os.close(fd)
    parent.stdout.close()


@pytest.mark.skipif(not LINUX, reason="PDEATHSIG is Linux's")
def test_a_parent_that_died_before_the_request_is_noticed(root):
    """PDEATHSIG is asked for after fork: when the parent's pid has changed by then, the child leaves at once."""
    done = subprocess.run(_argv(root, parent=1), stdin=subprocess.DEVNULL, capture_output=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, b"")


def test_sigterm_ends_it(root):
    child = subprocess.Popen(_argv(root), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()
    child.terminate()
    assert child.wait(60) == -signal.SIGTERM
    child.stdin.close()
    child.stdout.close()


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(_VALUES)
def test_the_spec_is_read_as_json_reads_it(value: object):
    assert start._decoded(json.dumps(value)) == value


@given(st.dictionaries(st.text(), st.text(), max_size=5))
def test_the_verdicts_are_written_as_json_writes_them(words: dict[str, str]):
    assert json.loads(start._encoded(words)) == words


def test_no_start_pays_for_what_only_type_checkers_need():
    code = f"import sys\nsys.path.append({str(ROOT)!r})\nimport engines.launch\n"
    code += "from engines.lockdown import canary, landlock, limits, privileges, seccomp, user, warden\n"
    code += "print(sorted({'ctypes', 'typing', 'json', 're', 'enum', 'signal', 'collections'} & set(sys.modules)))\n"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr
