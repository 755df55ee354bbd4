"""Pulls that are killed, doubled, offline, refused or of known models: the real command over real HTTP."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from protocol.engine_wire import Model
from protocol.faults import FaultError
from supervisor import pull
from supervisor.config import load
from supervisor.errors import ExitCode
from supervisor.host.work import EngineSpec, ModelSpec
from supervisor.machine.weights import Digests
from supervisor.model_store import Store
from supervisor.model_uses import ModelUses

CHAT = Path(__file__).parents[2] / "engines" / "llm" / "fixture" / "chat-q8_0.gguf"
BYTES = CHAT.read_bytes()
DIGEST = hashlib.sha256(BYTES).hexdigest()
COMMIT = "0123456789abcdef0123456789abcdef01234567"
COMMAND = [sys.executable, "-m", "supervisor", "models"]


@pytest.fixture
def box(models_box: Any) -> Any:
    """`conftest.ModelsBox`."""
    return models_box


@pytest.fixture
def store(box: Any) -> Store:
    return Store(box.models)


@pytest.fixture
def hub(site: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    site.repos["owner/chat"] = {"chat.gguf": BYTES}
    return site


def catalogue(box: Any, **fields: object) -> None:
    plain = {"source": "owner/chat", "kind": "llm", "engine": "llm", **fields}
    box.toml.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in plain.items())
    (box.toml.parent / "catalogue.toml").write_text(f'["my-chat"]\noptions = {{ n_ctx = 512 }}\n{lines}')


def _until(done: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not done():
        assert time.monotonic() < until, "it did not happen within 20 s"
        os.sched_yield()


def start(*argv: str, box: Any, **options: Any) -> subprocess.Popen[str]:
    words = [*COMMAND, *argv, "--config", str(box.toml)]
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True, **options)


# ---- known models --------------------------------------------------------------------------------------------


def test_a_known_model_by_its_name(box: Any, hub: Any):
    catalogue(box, file="chat.gguf", revision=COMMIT, sha256=DIGEST)
    assert box.run("pull", "my-chat") == 0, box.err
    (entry,) = box.entries()
    assert (entry["name"], entry["engine"], entry["options"]) == ("my-chat", "llm", {"n_ctx": 512})
    manifest = Store(box.models).manifest("my-chat")
    assert manifest is not None
    assert (manifest.revision, manifest.origin) == (COMMIT, f"hf:owner/chat@{COMMIT}")
    assert manifest.digests == {"chat.gguf": DIGEST}
    assert manifest.config == str(box.toml)
    box.check()


def test_the_users_engine_is_stronger_and_takes_no_foreign_options(box: Any, hub: Any):
    catalogue(box)
    assert box.run("pull", "my-chat", "--engine", "embed") == 0, box.err
    (entry,) = box.entries()
    assert entry["engine"] == "embed"
    assert "options" not in entry


def test_a_catalogue_whose_file_was_changed_is_told(box: Any, hub: Any):
    catalogue(box, sha256="00" * 32)
    assert box.run("pull", "my-chat") == ExitCode.FAILED
    assert "the catalogue says 0000" in box.err
    assert "the file was changed there" in box.err


def test_a_revision_that_is_gone_is_told(box: Any, hub: Any):
    catalogue(box, revision="fedcba9876543210fedcba9876543210fedcba98")
    assert box.run("pull", "my-chat") == ExitCode.FAILED
    assert "has no such revision: it was deleted or rewritten" in box.err


def test_a_misspelt_name_is_helped(box: Any):
    catalogue(box)
    assert box.run("pull", "mychat") == ExitCode.FAILED
    assert "Did you mean the known model my-chat?" in box.err


# ---- refused by the server: the model's error ------------------------------------------------------------------


def the_load_of(box: Any, name: str) -> str:
    """The fault of a load of a model that the pull did not bring."""
    files = {"model": str(box.models / name / "chat.gguf")}
    engine = EngineSpec(name="llm", module="x", python="x")
    spec = ModelSpec(name=name, engine=engine, model=Model(name=name, files=files))

    async def load_it() -> str:
        with pytest.raises(FaultError) as caught:
            await ModelUses(Digests().verify).verify(spec)
        assert caught.value.fault.code == "load_failed"
        return caught.value.fault.message

    return trio.run(load_it)


def test_a_gated_repository_is_the_models_error_at_its_load(box: Any, hub: Any):
    hub.gated.add("owner/chat")
    assert box.run("pull", "owner/chat") == ExitCode.FAILED
    assert "--token-file" in box.err
    message = the_load_of(box, "chat")
    assert "owner/chat is gated: accept its terms" in message
    hub.gated.clear()
    assert box.run("pull", "owner/chat") == 0
    assert Store(box.models).failure("chat") is None


@pytest.mark.parametrize(("status", "said"), [(401, "who you are"), (403, "accept its terms"), (404, "no such file")])
def test_refusals_of_plain_servers_are_the_models_error_too(box: Any, site: Any, status: int, said: str):
    site.status["/chat.gguf"] = [status]
    assert box.run("pull", f"{site.url}/chat.gguf", "--sha256", DIGEST) == ExitCode.FAILED
    assert said in box.err
    assert said in the_load_of(box, "chat")
    assert not box.toml.exists()


def test_a_file_that_moved_is_told(box: Any, hub: Any):
    hub.repos["owner/chat"] = {"renamed.gguf": BYTES}
    assert box.run("pull", "owner/chat:chat.gguf") == ExitCode.FAILED
    assert "has no file 'chat.gguf'; it has renamed.gguf" in box.err


def test_a_token_comes_from_a_file_of_the_user_alone(box: Any, hub: Any):
    hub.gated.add("owner/chat")
    token = box.folder / "token"
    token.write_text("hf_secret\n")
    token.chmod(0o644)
    assert box.run("pull", "owner/chat", "--token-file", str(token)) == ExitCode.FAILED
    assert "chmod 600" in box.err
    token.chmod(0o600)
    assert box.run("pull", "owner/chat", "--token-file", str(token)) == 0, box.err
    asked = {each["authorization"] for each in hub.asked if "owner/chat" in each["path"]}
    assert asked == {"Bearer hf_secret"}
    kept = [path for path in box.folder.rglob("*") if path.is_file() and path != token]
    assert not [path for path in kept if b"hf_secret" in path.read_bytes()], "it is written nowhere"


def test_a_token_for_a_plain_server(box: Any, site: Any):
    site.files["/chat.gguf"] = BYTES
    token = box.folder / "token"
    token.touch(0o600)
    token.write_text("secret")
    argv = ["pull", f"{site.url}/chat.gguf", "--sha256", DIGEST, "--token-file", str(token)]
    assert box.run(*argv) == 0, box.err
    assert [asked["authorization"] for asked in site.asked] == ["Bearer secret"]


# ---- killed ----------------------------------------------------------------------------------------------------


def test_kill_9_of_the_command_ends_its_child_and_the_same_command_goes_on(box: Any, site: Any):
    site.files["/chat.gguf"] = BYTES
    site.cut_after["/chat.gguf"] = [100_000]
    site.hold = threading.Event()
    argv = ["pull", f"{site.url}/chat.gguf", "--sha256", DIGEST]
    with start(*argv, box=box) as process:
        assert site.holding.wait(30)
        part = box.models / ".pulling-chat" / "chat.gguf.part"
        _until(lambda: part.exists() and part.stat().st_size == 100_000)
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert DIGEST not in Path(f"/proc/{child}/cmdline").read_text()
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)
    _until(lambda: _ended(child))
    site.hold.set()
    assert box.run(*argv) == 0, box.err
    assert site.ranges_asked() == ["", "bytes=100000-"]
    box.check()


def _ended(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize("moment", ["manifest", "rename", "worker.toml"])
def test_a_kill_at_any_later_moment_costs_no_second_download(
    box: Any, site: Any, monkeypatch: pytest.MonkeyPatch, moment: str
):
    """Each stands for a kill before that step; what is on the disk is what a kill leaves there."""
    site.files["/chat.gguf"] = BYTES
    argv = ["pull", f"{site.url}/chat.gguf", "--sha256", DIGEST]

    class Killed(BaseException):
        pass

    def kill(*_args: object, **_more: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if moment == "manifest":
            patch.setattr(Store, "settle", kill)
        elif moment == "rename":
            patch.setattr(Path, "rename", kill)
        else:
            patch.setattr(pull.WorkerToml, "save", kill)
        with pytest.raises(Killed):
            box.run(*argv)
    asked = len(site.asked)
    assert box.run(*argv) == 0, box.err
    assert len(site.asked) == asked, "every byte was here"
    box.check()


def test_a_model_that_is_here_but_damaged_is_not_adopted(box: Any, site: Any):
    site.files["/chat.gguf"] = BYTES
    argv = ["pull", f"{site.url}/chat.gguf", "--sha256", DIGEST]
    box.run(*argv)
    box.run("remove", "chat", "--keep-files")
    assert box.run(*argv) == 0
    assert "has it since" in box.err
    box.run("remove", "chat", "--keep-files")
    model = box.models / "chat" / "chat.gguf"
    model.write_bytes(BYTES[:-1] + b"X")
    assert box.run(*argv) == ExitCode.FAILED
    assert "is damaged" in box.err
    assert box.run(*argv, "--force") == 0, box.err
    box.check()


def test_an_entry_whose_files_are_gone_can_be_mended_and_removed(box: Any, site: Any):
    """Such a model is not served, and the cure must work nevertheless."""
    site.files["/chat.gguf"] = BYTES
    argv = ["pull", f"{site.url}/chat.gguf", "--sha256", DIGEST]
    box.run(*argv)
    shutil.rmtree(box.models / "chat")
    assert box.run(*argv) == ExitCode.FAILED
    assert load(box.toml).models[0].name == "chat"
    assert "--force` brings it back" in the_load_of(box, "chat")
    assert box.run(*argv, "--force") == 0, box.err
    box.check()
    shutil.rmtree(box.models / "chat")
    assert box.run("remove", "chat") == 0, box.err
    assert load(box.toml).models == []


def test_edits_of_worker_toml_during_a_pull_stay(box: Any, site: Any):
    site.files["/chat.gguf"] = BYTES
    site.cut_after["/chat.gguf"] = [100_000]
    site.hold = threading.Event()
    with start("pull", f"{site.url}/chat.gguf", "--sha256", DIGEST, box=box) as process:
        assert site.holding.wait(30)
        box.toml.parent.mkdir(parents=True, exist_ok=True)
        box.toml.write_text('# mine\n[worker]\nname = "edited-meanwhile"\n')
        site.hold.set()
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert load(box.toml).worker.name == "edited-meanwhile"
    assert "# mine" in box.toml.read_text()
    assert [entry["name"] for entry in box.entries()] == ["chat"]


# ---- two at once, offline, for programs -----------------------------------------------------------------------


def test_two_pulls_of_one_model_at_once(box: Any, site: Any):
    site.files["/chat.gguf"] = BYTES
    site.cut_after["/chat.gguf"] = [100_000]
    site.hold = threading.Event()
    argv = ["pull", f"{site.url}/chat.gguf", "--sha256", DIGEST]
    with start(*argv, box=box) as first:
        assert site.holding.wait(30)
        assert box.run(*argv) == ExitCode.FAILED
        assert f"Another pull of chat is at work (pid {first.pid})" in box.err
        assert Store(box.models).failure("chat") is None, "the second one's refusal is no failure of the model"
        site.hold.set()
        _, stderr = first.communicate(timeout=60)
    assert first.returncode == 0, stderr
    box.check()


@pytest.mark.parametrize("how", ["--offline", "HF_HUB_OFFLINE"])
def test_offline_takes_what_is_here_and_says_what_is_not(box: Any, hub: Any, monkeypatch: pytest.MonkeyPatch, how: str):
    assert box.run("pull", "owner/chat") == 0, box.err
    box.run("remove", "chat", "--keep-files")
    asked = len(hub.asked)
    more = ["--offline"] if how == "--offline" else []
    if not more:
        monkeypatch.setenv(how, "1")
    assert box.run("pull", "owner/other", *more) == ExitCode.FAILED
    assert box.err == f"owner/other is not here, and {how} forbids the network; {box.models} has: chat.\n"
    assert box.run("pull", "owner/chat", *more) == 0, box.err
    shutil.copy(CHAT, "local.gguf")
    assert box.run("pull", "local.gguf", *more) == 0, box.err
    assert len(hub.asked) == asked
    box.check()


def test_events_for_programs(box: Any, site: Any):
    site.files["/chat.gguf"] = BYTES
    site.status["/chat.gguf"] = [404]
    argv = ["pull", f"{site.url}/chat.gguf", "--sha256", DIGEST, "--json"]
    assert box.run(*argv) == ExitCode.FAILED
    events = [json.loads(line) for line in box.out.splitlines()]
    assert [event["t"] for event in events] == ["plan", "failed"]
    assert "no such file" in events[-1]["message"]
    assert box.run(*argv) == 0
    events = [json.loads(line) for line in box.out.splitlines()]
    assert events[0] == {"t": "plan", "files": ["chat.gguf"], "total_bytes": None, "origin": f"{site.url}/chat.gguf"}
    assert any(event["t"] == "progress" and event["done_bytes"] == len(BYTES) for event in events)
    assert events[-1]["t"] == "done"
    assert (events[-1]["name"], events[-1]["files"]) == ("chat", {"chat.gguf": DIGEST})


def test_a_limit_on_the_size_of_files_is_a_sentence(box: Any, site: Any):
    site.files["/chat.gguf"] = BYTES

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))

    argv = ["pull", f"{site.url}/chat.gguf", "--sha256", DIGEST]
    with start(*argv, box=box, preexec_fn=limit) as process:
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == ExitCode.FAILED
    assert "Files of this size are not allowed" in stderr
    assert "Traceback" not in stderr
    assert (box.models / ".pulling-chat" / "chat.gguf.part").stat().st_size == 150_000
    assert box.run(*argv) == 0, box.err
    assert site.ranges_asked() == ["", "bytes=150000-"]
    box.check()


@pytest.mark.parametrize("seed", [1, 2])
def test_kill_9_at_random_moments(box: Any, site: Any, seed: int):
    """The seed is the parameter. Whatever the moments were, the same command ends with a whole model."""
    dice = random.Random(seed)
    site.files["/chat.gguf"] = BYTES
    site.drip = 4_000  # the download alone takes half a second
    argv = ["pull", f"{site.url}/chat.gguf", "--sha256", DIGEST]
    killed = 0
    for latest_s in (0.2, 0.6, 0.9, 0.9, 0.9, 0.9):
        with start(*argv, box=box, stdout=subprocess.DEVNULL) as process:
            try:
                process.communicate(timeout=dice.uniform(0.05, latest_s))
                break  # it was through before its moment
            except subprocess.TimeoutExpired:
                process.kill()
                killed += 1
                process.communicate(timeout=30)
    if not box.toml.exists():
        assert box.run(*argv) == 0, box.err
    assert killed > 0
    box.check()
    assert box.run("verify") == 0
    assert sorted(path.name for path in box.models.iterdir()) == [".store", "chat"]


def test_a_repository_that_moved_on_during_an_interruption_is_resumed_by_digest(box: Any, hub: Any):
    hub.cut_after[f"/owner/chat/resolve/{COMMIT}/chat.gguf"] = [100_000]
    hub.hold = threading.Event()
    with start("pull", "owner/chat", box=box) as process:
        assert hub.holding.wait(30)
        part = box.models / ".pulling-chat" / "chat.gguf.part"
        _until(lambda: part.exists() and part.stat().st_size == 100_000)
        process.kill()
        process.communicate(timeout=30)
    hub.hold.set()
    hub.commit = "fedcba9876543210fedcba9876543210fedcba98"
    assert box.run("pull", "owner/chat") == 0, box.err
    asked = [each["range"] for each in hub.asked if "/resolve/" in each["path"]]
    assert asked == ["", "bytes=100000-"]
    manifest = Store(box.models).manifest("chat")
    assert manifest is not None
    assert manifest.revision == hub.commit
    box.check()
