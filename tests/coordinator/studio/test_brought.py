"""Models that their jobs bring the files of: whoever serves their kind is asked, until it says no."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from coordinator.studio.claims import Source, SourceFile
from coordinator.testing import Running, running
from tests.coordinator.studio_rig import ANSWER, CHAT, FAST, House, until

FILE = SourceFile(role="model", url="https://models.example/m.gguf", filename="m.gguf", sha256="a" * 64)
BROUGHT = "brought"
NOTHING: dict[str, Any] = {"supportedModels": [], "supportedModelsPerKind": {}}


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A coordinator that knows where the files of a model are."""
    sources = {BROUGHT: Source(engine="llama-cpp", files=[FILE]), "kept": Source(engine="llama-cpp")}
    with running(tmp_path_factory.mktemp("studio"), studio=FAST, studio_models=sources) as it:
        yield it


@pytest.fixture
def house(house: House) -> House:
    """Nobody of the test before is connected."""
    until(lambda: not house.there.coordinator.parts.dispatcher.workers())
    return house


def listed(house: House) -> list[str]:
    """What clients see."""
    return [one["id"] for one in house.client.get("/v1/models").json()["data"]]


def test_a_worker_that_has_no_model_gets_the_job_and_where_its_files_are(house: House) -> None:
    assert listed(house) == []
    with house.worker(taskKinds=["llm"], **NOTHING).session() as it:
        assert listed(house) == [BROUGHT]
        asked = house.ask("/v1/chat/completions", json={"model": BROUGHT, **CHAT})
        claim = it.claim()
        assert claim["model"] == BROUGHT
        assert claim["modelSource"]["engine"] == "llama-cpp"
        assert claim["modelSource"]["files"] == [
            {"role": "model", "url": FILE.url, "filename": "m.gguf", "sha256": FILE.sha256}
        ]
        it.send("completeJson", jobId=claim["jobId"], result=ANSWER)
        it.expect("completeAck")
        assert asked.result().json()["choices"][0]["message"]["content"] == "Hello you"
        it.beat(autoEnabled=False, taskKinds=["image"], **NOTHING)
        assert listed(house) == []
        it.beat(taskKinds=["llm"], **NOTHING)
        assert listed(house) == [BROUGHT]
    until(lambda: listed(house) == [])


def test_who_serves_another_kind_only_is_not_asked(house: House) -> None:
    with house.worker(taskKinds=["image"], **NOTHING).session():
        assert listed(house) == []
        refused = house.client.post("/v1/chat/completions", json={"model": BROUGHT, **CHAT})
        assert (refused.status_code, refused.json()["error"]["code"]) in ((503, "no_worker"), (404, "model_not_found"))


def test_who_says_no_does_not_fetch_and_is_not_asked_again(house: House) -> None:
    with (
        house.worker(taskKinds=["llm"], **NOTHING).session() as first,
        house.worker(taskKinds=["llm"], **NOTHING).session() as second,
    ):
        for asked in (first, second):
            waiting = house.ask("/v1/chat/completions", json={"model": BROUGHT, **CHAT})
            claim = asked.claim(accept=False)
            asked.send("reject", jobId=claim["jobId"], reason="This worker has no model 'brought'.")
            if asked is first:
                assert listed(house) == [BROUGHT]
                assert second.claim()["jobId"] == claim["jobId"]
                second.send("completeJson", jobId=claim["jobId"], result=ANSWER)
                second.expect("completeAck")
                assert waiting.result().status_code == 200
            else:
                assert waiting.result().status_code == 400
        until(lambda: listed(house) == [])
        first.beat(taskKinds=["llm"], supportedModels=[BROUGHT], supportedModelsPerKind={"llm": [BROUGHT]})
        assert listed(house) == [BROUGHT], "what it has itself it says itself"


def test_a_busy_worker_may_fetch_all_the_same(house: House) -> None:
    with house.worker(taskKinds=["llm"], **NOTHING).session() as it:
        waiting = house.ask("/v1/chat/completions", json={"model": BROUGHT, **CHAT})
        it.send("reject", jobId=it.claim(accept=False)["jobId"], reason="not now", code="busy")
        claim = it.claim()
        it.send("completeJson", jobId=claim["jobId"], result=ANSWER)
        assert waiting.result().status_code == 200
