"""What a mount namespace covers and what it gives instead."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[3] / "engines" / "launch.py"
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's")


@pytest.fixture
def elsewhere():
    """A scratch folder outside /tmp, as a state folder is."""
    folder = Path("/var/lib" if os.access("/var/lib", os.W_OK) else Path.home()) / f"bulkhead-{secrets.token_hex(6)}"
    folder.mkdir(mode=0o755)
    yield folder
    shutil.rmtree(folder)


def told(done) -> tuple[list[str], dict[str, str]]:
    assert done.returncode == 0, done.stderr
    *lines, verdicts = done.stdout.splitlines()
    return lines, json.loads(verdicts)


def test_shared_memory_is_its_own_and_bounded_and_ends_with_it(confined):
    token = secrets.token_hex(8)
    code = (
        "import errno, mmap, os\n"
        f"fd = os.open('/dev/shm/{token}', os.O_CREAT | os.O_RDWR)\n"
        "os.ftruncate(fd, 2**20)\n"
        "mmap.mmap(fd, 2**20)[0] = 1\n"
        "print(os.listdir('/dev/shm'), flush=True)\n"
        "try: os.posix_fallocate(fd, 0, 2**34)\n"
        "except OSError as error: print(errno.errorcode[error.errno], flush=True)\n"
    )
    lines, verdicts = told(confined(code))
    if verdicts["pid"] != "verified":
        pytest.skip("no namespaces here")
    assert lines == [f"['{token}']", "ENOSPC"]
    assert token not in os.listdir("/dev/shm")


@pytest.mark.skipif(
    any(str(path).startswith("/tmp/") for path in (LAUNCH, sys.prefix, sys.base_prefix)),
    reason="this checkout or its interpreter lies below /tmp, so engines have to see that",
)
def test_a_tmp_of_its_own_for_programs(elsewhere: Path):
    """Where nothing granted lies in the box's /tmp."""
    token = secrets.token_hex(8)
    boot = elsewhere / "engines/runtime/boot.py"
    boot.parent.mkdir(parents=True)
    boot.write_text(
        "import os, tempfile\n"
        f"open('/tmp/{token}', 'w').write('x')\n"
        "print(os.listdir('/tmp'), tempfile.gettempdir())\n"
        "print(os.environ['BULKHEAD_SANDBOX'])\n"
    )
    policy = {
        "read": ["/proc", str(elsewhere)],
        "execute": ["/usr", "/lib", "/lib64", sys.prefix, sys.base_prefix],
        "write": [str(elsewhere)],
    }
    folder = str(elsewhere)
    spec = {"root": folder, "module": "x", "python": sys.executable, "scratch": folder, "sandbox": policy}
    theirs, ours = os.pipe()
    try:
        argv = [sys.executable, "-I", "-S", str(LAUNCH), json.dumps(spec), str(theirs)]
        done = subprocess.run(argv, capture_output=True, text=True, pass_fds=(theirs,), timeout=120, check=False)
    finally:
        os.close(theirs)
        os.close(ours)
    lines, verdicts = told(done)
    if verdicts["pid"] != "verified":
        pytest.skip("no namespaces here")
    assert verdicts["mounts"] == "verified"
    assert lines == [f"['{token}'] {elsewhere}"]
    assert not Path(f"/tmp/{token}").exists()
