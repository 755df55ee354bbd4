"""An engine that is a few lines of code, run by the real launcher where any user can reach it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
PYTHON = shutil.which("python3", path="/usr/bin:/usr/local/bin") or sys.executable
ENGINE_UID = 65521
Confined = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A folder that every user can reach. Not tmp_path: pytest keeps that to its user, and closes it again."""
    with tempfile.TemporaryDirectory(prefix="bulkhead-test-", ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def launcher(reachable: Path) -> Callable[..., list[str]]:
    """launcher(code, …): argv of the launcher, but for the lifeline, of an engine that is this code.

    `uid` will start it, `drop` lets it change to the engines' user, or to the user with that number; `spec` and the
    rest are more fields of the spec and of the policy. The last line of its output are its verdicts.
    """
    scratch = reachable / "scratch"
    scratch.mkdir()
    boot = reachable / "root/engines/runtime/boot.py"
    boot.parent.mkdir(parents=True)
    shutil.copytree(ROOT / "engines" / "lockdown", reachable / "code/engines/lockdown")
    for name in ("__init__.py", "launch.py"):
        shutil.copy(ROOT / "engines" / name, reachable / "code/engines" / name)

    def make(
        code: str,
        *,
        uid: int | None = None,
        drop: bool | int = False,
        spec: dict[str, Any] | None = None,
        **policy: Any,
    ) -> list[str]:
        user = ENGINE_UID if drop is True else int(drop)
        boot.write_text(code + "\nprint(__import__('os').environ.get('BULKHEAD_SANDBOX'), flush=True)\n")
        if os.geteuid() == 0:
            os.chown(scratch, user or uid or 0, 0)
            scratch.chmod(0o770)
        made: dict[str, Any] = {
            "read": ["/proc", "/sys", "/etc/ld.so.cache", str(reachable / "root")],
            "execute": ["/lib", "/lib64", "/usr/lib", "/usr/local/lib", os.path.realpath(PYTHON)],
            "write": [str(scratch)],
            "devices": ["/dev/null"],
        }
        if drop:
            needs = {"runs": [PYTHON], "reads": [str(reachable / "root")], "writes": [str(scratch)]}
            made["user"] = {"uid": user, "gid": user, **needs}
        whole = {
            "root": str(reachable / "root"),
            "module": "none",
            "python": PYTHON,
            "scratch": str(scratch),
            "sandbox": made | policy,
        } | (spec or {})
        return [PYTHON, "-I", "-S", str(reachable / "code/engines/launch.py"), json.dumps(whole)]

    return make


@pytest.fixture
def confined(launcher: Callable[..., list[str]]) -> Confined:
    """confined(code, …): run it, see `launcher`."""

    def run(code: str, *, uid: int | None = None, **more: Any) -> subprocess.CompletedProcess[str]:
        theirs, ours = os.pipe()
        as_user = {} if uid is None else {"user": uid, "group": uid, "extra_groups": []}
        try:
            return subprocess.run(
                [*launcher(code, uid=uid, **more), str(theirs)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                pass_fds=(theirs,),
                timeout=120,
                check=False,
                env={"PATH": "/usr/bin:/bin"},
                **as_user,  # type: ignore[call-overload]
            )
        finally:
            os.close(theirs)
            os.close(ours)

    return run
