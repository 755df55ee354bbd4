"""What a hostile owner of `out` can plant, and that none of it is opened, followed or believed."""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import tempfile
from pathlib import Path

import pytest

from protocol.engine_wire import OutputFile
from protocol.faults import FaultError
from supervisor.host.engine_user import User
from supervisor.host.ground import Attempt, Ground, give

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="made of links and pipes")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives folders away")
CONTENT = b"pixels"


@pytest.fixture
def ground(tmp_path: Path) -> Ground:
    return Ground(tmp_path / "m0", user=None)


@pytest.fixture
def attempt(ground: Ground):
    made = ground.open_attempt("job_1.1")
    yield made
    made.close()


@pytest.fixture
def reachable():
    """A folder that every user can pass through; pytest keeps its own to its user."""
    with tempfile.TemporaryDirectory(prefix="bulkhead-test-") as name:
        Path(name).chmod(0o711)
        yield Path(name)


def told(name: str = "a.png", content: bytes = CONTENT) -> OutputFile:
    return OutputFile(name, "image/png", len(content), hashlib.sha256(content).hexdigest())


def read(attempt: Attempt, file: OutputFile) -> bytes:
    with os.fdopen(attempt.open_output(file), "rb") as content:
        return content.read()


def refused(attempt: Attempt, file: OutputFile) -> str:
    with pytest.raises(FaultError) as caught:
        attempt.open_output(file)
    assert caught.value.fault.code == "engine_protocol"
    assert repr(file.name) in caught.value.fault.message
    return caught.value.fault.message


def test_an_output_is_read_from_where_it_was_written(attempt: Attempt):
    (attempt.outputs / "a.png").write_bytes(CONTENT)
    assert read(attempt, told()) == CONTENT


def test_an_input_is_written_anew_each_time_and_never_through_a_link(attempt: Attempt, tmp_path: Path):
    for content in (b"a longer one", b"short"):
        with os.fdopen(attempt.create_input("audio"), "wb") as file:
            file.write(content)
    assert (attempt.inputs / "audio").read_bytes() == b"short"
    (tmp_path / "victim").write_text("mine")
    (attempt.inputs / "link").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError):
        attempt.create_input("link")
    with pytest.raises(OSError, match="plain"):
        attempt.create_input("../x")
    assert (tmp_path / "victim").read_text() == "mine"


def _symlink(out: Path, secret: Path) -> OutputFile:
    (out / "a.png").symlink_to(secret)
    return told(content=secret.read_bytes())


def _hard_link(out: Path, secret: Path) -> OutputFile:
    (out / "a.png").hardlink_to(secret)
    return told(content=secret.read_bytes())


def _pipe(out: Path, _secret: Path) -> OutputFile:
    os.mkfifo(out / "a.png")
    return told(content=b"")


def _folder(out: Path, _secret: Path) -> OutputFile:
    (out / "a.png").mkdir()
    return told()


def _short(out: Path, _secret: Path) -> OutputFile:
    (out / "a.png").write_bytes(CONTENT[:-1])
    return told()


def _grown(out: Path, _secret: Path) -> OutputFile:
    (out / "a.png").write_bytes(CONTENT + b"more")
    return told()


def _sparse_giant(out: Path, _secret: Path) -> OutputFile:
    with (out / "a.png").open("wb") as file:
        file.truncate(2**40)
    return OutputFile("a.png", "image/png", 2**40, "0" * 64)


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (_symlink, "cannot be opened"),
        (_hard_link, "has 2 names"),
        (_pipe, "not a regular file"),
        (_folder, "not a regular file"),
        (_short, "has 5 bytes, not 6"),
        (_grown, "has 10 bytes, not 6"),
        (_sparse_giant, "more than the 1000000000"),
        (lambda _out, _secret: told("gone"), "cannot be opened"),
        (lambda _out, _secret: told("../up"), "not a plain file name"),
        (lambda _out, _secret: told("/etc/passwd"), "not a plain file name"),
        (lambda _out, _secret: told(""), "not a plain file name"),
        (lambda _out, _secret: told(".."), "not a plain file name"),
        (lambda _out, _secret: told("a\0b"), "not a plain file name"),
    ],
)
def test_what_an_engine_calls_an_output_is_checked(tmp_path: Path, plant, words: str):
    ground = Ground(tmp_path / "m0", limit_bytes=10**9, user=None)
    attempt = ground.open_attempt("job_1.1")
    secret = tmp_path / "secret"
    secret.write_bytes(CONTENT)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert words in refused(attempt, plant(attempt.outputs, secret))
    assert not before or len(os.listdir("/proc/self/fd")) <= before  # what earlier tests left may go meanwhile
    assert attempt.remove()
    assert secret.read_bytes() == CONTENT


def test_a_device_node_is_no_output(attempt: Attempt):
    if os.geteuid() == 0:
        os.mknod(attempt.outputs / "a.png", 0o600 | stat.S_IFCHR, os.makedev(1, 5))
        assert "not a regular file" in refused(attempt, told(content=b""))


def test_the_whole_folder_swapped_for_a_link(attempt: Attempt, tmp_path: Path):
    """The supervisor reads from the folder it made, whatever lies under its name by now."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.png").write_bytes(CONTENT)
    attempt.outputs.rename(tmp_path / "m0/out/moved")
    attempt.outputs.symlink_to(tmp_path / "elsewhere")
    assert "cannot be opened" in refused(attempt, told())
    assert attempt.remove()
    assert (tmp_path / "elsewhere/a.png").exists()


def test_the_shared_folder_swapped_for_a_link(ground: Ground, tmp_path: Path):
    ground.make()
    (tmp_path / "elsewhere/job_1.1").mkdir(parents=True)
    ground.outputs.rmdir()
    ground.outputs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        ground.open_attempt("job_1.1")
    with pytest.raises(OSError):
        ground.remove_attempt("job_1.1")
    assert (tmp_path / "elsewhere/job_1.1").is_dir()


def test_what_a_fenced_attempt_left_is_gone_before_the_next(ground: Ground):
    first = ground.open_attempt("job_1.1")
    (first.outputs / "old").touch()
    second = ground.open_attempt("job_1.1")
    assert list(second.outputs.iterdir()) == []
    first.close()
    assert second.remove()
    assert not second.outputs.exists()
    assert not second.inputs.exists()
    assert ground.remove_attempt("job_1.1")


def test_names_that_are_paths_are_never_folders(ground: Ground):
    for name in ("..", "", "a/b", "."):
        with pytest.raises(OSError, match="plain"):
            ground.open_attempt(name)
        with pytest.raises(OSError, match="plain"):
            ground.remove_attempt(name)


def test_modes_without_a_user_of_their_own(ground: Ground, attempt: Attempt):
    scratch = ground.make_instance(3)
    assert scratch == ground.root / "i3"
    for folder in (scratch, ground.inputs, ground.outputs, ground.root):
        assert folder.stat().st_mode & 0o777 == 0o700
    give(scratch, None)


@as_root
def test_the_engines_user_owns_scratch_and_outputs_and_only_reads_inputs(reachable: Path):
    user = User(65521, 65521)
    ground = Ground(reachable / "instances/m0", user=user)
    scratch = ground.make_instance(1)
    attempt = ground.open_attempt("job_1.1")
    other = ground.open_attempt("job_2.1")
    with os.fdopen(attempt.create_input("audio"), "wb") as file:
        file.write(b"RIFF")

    def tried(work) -> bool:
        try:
            work()
        except PermissionError:
            return False
        return True

    pid = os.fork()
    if pid == 0:
        os.setgroups([])
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, user.uid)
        found = [
            tried((scratch / "x").touch),
            tried((attempt.outputs / "a.png").touch),
            tried((attempt.inputs / "audio").read_bytes),
            tried((attempt.inputs / "new").touch),
            tried(lambda: (attempt.inputs / "audio").write_text("x")),
            tried(lambda: attempt.outputs.rename(ground.outputs / "moved")),
            tried(lambda: os.listdir(ground.root)),
            tried((ground.root / "new").touch),
        ]
        os._exit(sum(1 << number for number, each in enumerate(found) if each))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0b111
    assert attempt.remove()
    other.close()


@as_root
def test_nothing_is_given_away_through_a_link(tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError):
        give(tmp_path / "link", User(65521, 65521))
    assert (tmp_path / "mine").stat().st_uid == 0
