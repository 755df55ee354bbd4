"""A model is deployed to a real worker: fetched from a hub, proved, asked by a client, renewed, and given up."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
CHAT = ROOT / "engines" / "llm" / "fixture" / "chat-q8_0.gguf"
SOURCE = "owner/Chat-GGUF"
QUESTION = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}

pytestmark = [pytest.mark.slow, pytest.mark.engine]
pytest.importorskip("huggingface_hub")
pytest.importorskip("xllamacpp")


@pytest.fixture
def hub() -> Iterator[Any]:
    """A stand-in for a Hugging Face hub, with one model in it."""
    path = ROOT / "tests" / "supervisor" / "stand_in_hub.py"
    spec = importlib.util.spec_from_file_location("stand_in_hub", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.serving(module.Site()) as site:
        site.repos[SOURCE] = {"chat-Q8_0.gguf": CHAT.read_bytes()}
        yield site


@pytest.fixture
def rig(new_rig: Callable[..., Any], hub: Any) -> Any:
    """A worker without a model, whose owner lets his coordinator deploy what `owner` publishes."""
    rig = new_rig(
        models='[coordinator.deploy]\nsources = ["owner/*"]\n', want=frozenset(), env={"HF_ENDPOINT": hub.url}
    )
    rig.ready()
    return rig


@pytest.fixture
def admin(rig: Any) -> Iterator[httpx.Client]:
    made = subprocess.run(
        [
            sys.executable,
            "-m",
            "coordinator",
            "keys",
            "create",
            "--scope",
            "admin",
            "--state",
            rig.state / "coordinator",
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    headers = {"authorization": f"Bearer {made.stdout.split()[-1]}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{rig.port}", headers=headers, timeout=120) as client:
        yield client


def test_a_model_is_deployed_renewed_and_given_up(rig: Any, rigs: Any, admin: httpx.Client, hub: Any) -> None:
    def shown() -> dict[str, Any]:
        answer: dict[str, Any] = admin.get("/v1/deployments/big").json()
        return answer

    def serves(revision: str) -> bool:
        said = shown()
        assert not [one for one in said["workers"] if one["state"] == "failed"], said
        return bool(said["serving"] == revision and said["ready"] == 1 and len(said["workers"]) == 1)

    asked = {"source": f"{SOURCE}@{hub.commit}", "options": {"n_ctx": 256}}
    first = admin.put("/v1/deployments/big", json=asked).json()["revision"]
    rigs.until(lambda: serves(first), "the model is served")
    client = rig.client()
    answer = client.post("/v1/chat/completions", json={"model": "big", **QUESTION})
    assert answer.status_code == 200, answer.text
    assert f"big@{first}" in rig.config.read_text()
    second = admin.put("/v1/deployments/big", json={"options": {"n_ctx": 512}}).json()["revision"]
    assert second != first
    rigs.until(lambda: serves(second), "the other revision took over")
    assert client.post("/v1/chat/completions", json={"model": "big", **QUESTION}).status_code == 200
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["big"]
    rig.kill()
    rig.ready()  # what was deployed is served again without being fetched
    admin.base_url = f"http://127.0.0.1:{rig.port}"
    fetched = len(hub.asked)
    rigs.until(lambda: serves(second), "it is served after a restart")
    assert len(hub.asked) == fetched
    admin.delete("/v1/deployments/big")
    rigs.until(lambda: admin.get("/v1/deployments/big").status_code == 404, "it has gone")
    assert "big@" not in rig.config.read_text()
    assert not list((rig.state / "models").rglob("*.gguf"))


def test_how_far_a_download_is_is_shown_to_who_deploys(rig: Any, rigs: Any, admin: httpx.Client, hub: Any) -> None:
    hub.hold = threading.Event()  # the first part comes, and then a byte a minute until this is set
    hub.cut_after[f"/{SOURCE}/resolve/{hub.commit}/chat-Q8_0.gguf"] = [150_000, *[1] * 20]
    admin.put("/v1/deployments/big", json={"source": f"{SOURCE}@{hub.commit}"})

    def fetched() -> bool:
        workers = admin.get("/v1/deployments/big").json()["workers"]
        return any(" of 0.4 MB" in one["why"] and one["state"] == "fetching" for one in workers)

    rigs.until(fetched, "it is shown how much came")
    hub.cut_after.clear()
    hub.hold.set()
    rigs.until(lambda: admin.get("/v1/deployments/big").json()["ready"] == 1, "the rest came")
    assert all(one["why"] == "" for one in admin.get("/v1/deployments/big").json()["workers"])


def test_what_the_owner_does_not_allow_is_told_to_who_deploys(rig: Any, rigs: Any, admin: httpx.Client) -> None:
    admin.put("/v1/deployments/big", json={"source": f"other/Model@{'0' * 40}"})

    def failed() -> str:
        workers = admin.get("/v1/deployments/big").json()["workers"]
        return next((one["why"] for one in workers if one["state"] == "failed"), "")

    why = rigs.until(failed, "the refusal is shown")
    assert "none of the sources that the owner of this worker allows" in why
    assert "It is tried again in" in why
