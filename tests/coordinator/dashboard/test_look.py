"""One look at a running coordinator."""

from __future__ import annotations

from coordinator.dashboard.feed import Picture
from coordinator.deploy.spec import Asked
from coordinator.store.watch import JobFilter
from coordinator.testing import FakeWorker, Running
from protocol.link_wire import ModelOffer


def test_a_look_has_every_section(served: Running) -> None:
    look = served.coordinator.parts.look

    async def picture() -> Picture:
        return await look()

    offer = ModelOffer(name="looked-at", kinds=("llm",), engine="fake")
    with FakeWorker(served, (offer,), lambda job: None, "seen"):
        seen = served.call(picture)
    assert set(seen) == {"head", "workers", "queues", "deployments", "jobs", "pending", "trouble"}
    assert "seen" in seen["workers"]
    assert "llm/looked-at" in seen["queues"]
    head = seen["head"][""]
    assert (head["state"], head["workers"] >= 1, head["trouble"] if "trouble" in head else "") == ("ok", True, "")
    assert seen["trouble"] == {}


def test_jobs_of_all_tenants_are_found(served: Running) -> None:
    look = served.coordinator.parts.look

    async def jobs() -> list[str]:
        return [record.id for record in await look.jobs(JobFilter(model="nobody-has-made-any"), 5)]

    async def job() -> object:
        return await look.job("job_nobody")

    assert served.call(jobs) == []
    assert served.call(job) is None


def test_what_the_fleet_is_told_to_serve_is_looked_at(served: Running) -> None:
    look = served.coordinator.parts.look
    parts = served.coordinator.parts
    asked = Asked(
        name="looked-for", source="https://models.example/a.gguf", sha256="a" * 64, replicas=2, on={"worker": "nobody"}
    )

    async def picture() -> Picture:
        await parts.deployer.deploy(asked.name, lambda _known: asked)
        look._deployments_at = float("-inf")
        return await look()

    async def gone() -> None:
        await parts.deployer.undeploy("looked-for")

    row = served.call(picture)["deployments"]["looked-for"]
    served.call(gone)
    assert (row["wanted"], row["ready"], row["serving"], row["workers"]) == (2, 0, "", [])
