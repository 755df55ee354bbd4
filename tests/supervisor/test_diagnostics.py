"""The bundle explains a worker, and holds no secret and no word of a caller, whatever these are."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from supervisor.config import load
from supervisor.control.snapshot import GpuView, IncidentView, ModelView, Snapshot
from supervisor.diagnostics import MAX_BYTES, Seen, bundle
from supervisor.intake.holds import Hold, Source
from supervisor.observe.ring import Entry


def unpacked(data: bytes) -> dict[str, str]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
        return {
            member.name.removeprefix("bulkhead-diagnostics/"): archive.extractfile(member).read().decode()
            for member in archive
        }


def parsed(files: dict[str, str], name: str) -> Any:
    return json.loads(files[name])


CONFIG = """[worker]
state_dir = "state"
[coordinator]
url = "wss://coordinator.example"
token_file = "token"
[engines.synthetic]
env = {{ MY_API_KEY = {secret}, MODE = "fast" }}
[[models]]
name = "synthetic"
engine = "synthetic"
options = {{ {options} }}
"""


@pytest.fixture
def box(tmp_path: Path) -> Path:
    (tmp_path / "state" / "coordinator").mkdir(parents=True)
    (tmp_path / "worker.toml").write_text(CONFIG.format(secret='"an-env-secret"', options="tokens = 3"))
    (tmp_path / "token").write_text("the-token\n")
    (tmp_path / "token").chmod(0o600)
    return tmp_path


def seen(words: str = "something that a caller wrote") -> Seen:
    """What a supervisor shows when engines repeat every word of a prompt wherever they can speak."""
    return Seen(
        status=Snapshot(
            version="1",
            worker="box",
            why=f"synthetic: {words}",
            models=(ModelView(name="synthetic", engine="synthetic", state="cold", reason=words, last_end=words),),
            gpus=(GpuView(uuid="GPU-1", why=words),),
            holds=(Hold(source=Source.OPERATOR, reason="a game", since=1.0),),
            incidents=(IncidentView(time="t", model="synthetic", message=words),),
        ),
        holds={"presence": "input 3 s ago"},
        metrics="bulkhead_up 1\n",
        lines=[
            Entry(seq=1, time=1.0, level="info", logger="supervisor.app", message="draining"),
            Entry(seq=2, time=1.0, level="info", logger="supervisor.host.instance", message=f"synthetic: {words}"),
            Entry(seq=3, time=1.0, level="error", logger="supervisor.host.lane", message=f"failed: {words}"),
            Entry(seq=4, time=1.0, level="info", logger="httpx", message=words),
            Entry(seq=5, time=1.0, level="info", logger="supervisor.x", message="y", fields={"extra": words}),
            Entry(
                seq=6,
                time=1.0,
                level="error",
                logger="supervisor.x",
                message="z",
                traceback=f'Traceback:\n  File "a.py", line 1\n    code({words!r})\nValueError: {words}',
            ),
        ],
        incidents=[IncidentView(time="t", model="synthetic", how="killed by SIGSEGV", message=words)],
    )


def test_it_explains_a_worker(box):
    settings = load(box / "worker.toml", {})
    files = unpacked(bundle(box / "worker.toml", box / "state", seen(), settings=settings, environ={"HOME": "/h"}))
    assert parsed(files, "about.json")["running"] is True
    rows = {row["key"]: row for row in parsed(files, "about.json")["config"]["values"]}
    assert rows["coordinator.url"]["value"] == "wss://coordinator.example"
    assert rows["coordinator.url"]["source"] == "file"
    assert rows["engines.synthetic.env.MODE"]["value"] == "fast"
    assert rows["models.synthetic.options.tokens"]["value"] == 3
    assert parsed(files, "machine.json")["environment"]["names"] == ["HOME"]
    assert "trio" in parsed(files, "packages.json")
    assert parsed(files, "status.json")["models"][0]["name"] == "synthetic"
    assert parsed(files, "status.json")["holds"][0]["reason"] == "a game"
    assert parsed(files, "incidents.json") == [
        {"time": "t", "model": "synthetic", "how": "killed by SIGSEGV", "code": "", "diagnosis": ""}
    ]
    lines = [json.loads(line) for line in files["log.jsonl"].splitlines()]
    assert [line["seq"] for line in lines] == [1, 2, 3, 5, 6], "lines of libraries stay out"
    assert lines[0]["message"] == "draining"
    assert lines[1]["message"] == "synthetic: [29 characters]"
    assert lines[-1]["traceback"] == ['  File "a.py", line 1']


def test_without_a_running_supervisor_there_is_a_bundle_too(box):
    files = unpacked(bundle(box / "worker.toml", box / "state"))
    assert parsed(files, "about.json")["running"] is False
    assert "status.json" not in files
    assert parsed(files, "verdicts.json") is None


def test_mistakes_of_the_configuration_and_of_kept_files_are_shown(box):
    (box / "worker.toml").write_text("[worker]\nnmae = 'x'\n")
    (box / "state" / "peaks.json").write_text("{")
    files = unpacked(bundle(box / "worker.toml", box / "state"))
    assert "nmae" in parsed(files, "about.json")["config"]["problems"][0]
    assert parsed(files, "peaks.json") == {"unreadable": "DecodeError"}
    assert parsed(unpacked(bundle(None, box / "nothing")), "about.json")["config"] == {"path": None}


# Long enough that they are not words of the bundle's own, like "true".
SECRETS = (
    st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=9, max_size=30)
    .map(str.strip)
    .filter(lambda text: len(text) >= 9)
)


def toml(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


@hypothesis_settings(
    max_examples=25,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(SECRETS, min_size=5, max_size=5, unique=True), SECRETS, st.booleans())
def test_no_secret_and_no_word_of_a_caller_is_in_it(box, secrets, prompt, mistaken):
    """Wherever secrets lie, they are repeated where they may be seen; prompts are said wherever engines speak."""
    in_config, in_token, in_environ, in_state, in_credential = secrets
    prompt = f"q{prompt}q"
    options = f"system = {toml(prompt)}" if mistaken else "tokens = 3"
    (box / "worker.toml").write_text(CONFIG.format(secret=toml(in_config), options=options))
    (box / "token").write_text(in_token + "\n")
    (box / "state" / "coordinator" / "client.key").write_text(in_state)
    (box / "credentials").mkdir(exist_ok=True)
    (box / "credentials" / "coordinator-token").write_text(in_credential)
    environ = {"BULKHEAD_TOKEN": in_environ, "CREDENTIALS_DIRECTORY": str(box / "credentials"), "LANG": in_environ}
    (box / "state" / "quarantines.json").write_text(json.dumps({"synthetic": {"reason": prompt, "until": 1}}))
    told = seen(prompt)
    leaked = " ".join(secrets)
    told.lines.append(Entry(seq=9, time=1.0, level="info", logger="supervisor.app", message=leaked))
    told = Seen(
        status=told.status,
        holds={leaked: leaked},
        metrics=f'x{{a="{leaked}"}} 1\n',
        lines=told.lines,
        incidents=[*told.incidents, IncidentView(time="t", model=leaked)],
        reload={"problems": [leaked]},
    )
    files = unpacked(bundle(box / "worker.toml", box / "state", told, environ=environ))
    for name, text in files.items():
        for secret in (*secrets, prompt):
            for spelling in (secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]):
                assert spelling not in text, (name, secret)


def test_it_stays_below_its_bound_and_what_is_cut_says_so(box):
    lines = [
        Entry(seq=number, time=1.0, level="info", logger="supervisor.x", message=f"{number} " + "ab cd " * 5000)
        for number in range(1, 130)
    ]
    most = 200_000
    files = unpacked(
        bundle(box / "worker.toml", box / "state", Seen(lines=lines, metrics="x 1\n" * 50_000), max_bytes=most)
    )
    assert sum(len(text) for text in files.values()) <= most
    assert "[cut: the bundle is full]" in files["log.jsonl"]
    assert "[cut: the bundle is full]" in files["metrics.txt"]
    assert '"seq":129' in files["log.jsonl"], "of a log the end matters"
    assert parsed(files, "packages.json")
    tiny = unpacked(bundle(box / "worker.toml", box / "state", max_bytes=20_000))
    assert 0 < sum(len(text) for text in tiny.values()) <= 20_000
    assert MAX_BYTES == 20 * 2**20
