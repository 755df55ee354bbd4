"""Single models and single jobs, as the owner's orders see them."""

from __future__ import annotations

import pytest

from protocol.faults import Fault
from protocol.link_wire import Fail, Offer
from supervisor.control.exchange import Refused
from supervisor.host.work import InstanceStatus
from supervisor.link.ledger import Claim, Ledger
from supervisor.orders_engines import HostEngines, LinkJobs


class Host:
    """Shows what it is told to, and notes what it is asked."""

    def __init__(self, **status: object) -> None:
        self.status = {"state": "cold", **status}
        self.asked: list[tuple[object, ...]] = []

    def snapshot(self) -> list[InstanceStatus]:
        return [
            InstanceStatus(model="other", engine="e", state="ready", pid=3),
            InstanceStatus(**{"model": "chat", "engine": "e", **self.status}),
        ]

    def preload(self, model: str, *, ordered: bool = False) -> None:
        assert ordered, "its owner says so: idle models make room"
        self.asked.append(("preload", model))

    def unload(self, model: str, reason: str, *, again: bool) -> None:
        self.asked.append(("unload", model, reason, again))


def made(host: Host, stopped: list[object] | None = None) -> HostEngines:
    return HostEngines(host, lambda models, fault: None if stopped is None else stopped.append((set(models), fault)))


LOADED = {"state": "ready", "pid": 7}


@pytest.mark.parametrize(
    ("status", "phrase"),
    [
        ({}, ""),
        (LOADED, "it is loaded (pid 7)"),
        ({"state": "busy", "pid": 7, "running": 1}, "1 job runs on it, it is loaded (pid 7)"),
        ({"state": "busy", "running": 2, "queued": 1}, "2 jobs run on it, 1 job waits for it"),
        ({"state": "backoff", "queued": 3}, "3 jobs wait for it"),
    ],
)
def test_who_uses_a_model_is_told(status, phrase):
    assert made(Host(**status)).users("chat") == phrase


def test_the_copies_of_a_model_count_as_one():
    class Copies(Host):
        def snapshot(self) -> list[InstanceStatus]:
            return [
                InstanceStatus(model="chat", engine="e", state="quarantined", blocked=True, queued=1),
                InstanceStatus(model="chat", engine="e", state="busy", pid=8, running=2, copy=1),
                InstanceStatus(model="chat", engine="e", state="loading", pid=9, copy=2),
            ]

    engines = made(Copies())
    assert list(engines.names()) == ["chat"]
    assert engines.users("chat") == "2 jobs run on it, 1 job waits for it, it is loaded (pid 8)"
    assert engines.why_not("chat") == "", "one of them serves"
    assert engines.load("chat") == "chat is loaded already."
    assert engines.unload("chat", "x") == "chat ends after 2 jobs; 1 job waits for it, and loads it again."


def test_why_a_model_cannot_be_loaded():
    assert made(Host()).why_not("chat") == ""
    assert made(Host(blocked=True, reason="It crashed 5 times")).why_not("chat") == "It crashed 5 times."
    assert made(Host(reason="It was idle for 5 s.")).why_not("chat") == "", "why it is not loaded is no reason"
    refused = HostEngines(Host(), lambda _models, _fault: None, lambda model: f"no GPU for {model}")
    assert refused.why_not("chat") == "no GPU for chat."


@pytest.mark.parametrize(
    ("status", "asked", "said"),
    [
        ({}, [("preload", "chat")], "chat is being loaded."),
        (LOADED, [], "chat is loaded already."),
        ({"state": "loading", "pid": 7}, [("preload", "chat")], "chat is being loaded."),
    ],
)
def test_load(status, asked, said):
    host = Host(**status)
    assert made(host).load("chat") == said
    assert host.asked == asked


@pytest.mark.parametrize(
    ("status", "acts", "said"),
    [
        ({}, True, "chat is not loaded."),  # an order to load it may be waiting for room, and is taken back
        ({"queued": 2}, False, "chat is not loaded; 2 jobs wait for it."),
        (LOADED, True, "chat ends now."),
        ({**LOADED, "running": 1}, True, "chat ends after 1 job."),
        (
            {"state": "busy", "pid": 7, "running": 2, "queued": 1},
            True,
            "chat ends after 2 jobs; 1 job waits for it, and loads it again.",
        ),
        ({"state": "loading", "pid": 7}, True, "chat ends now."),
    ],
)
def test_unload(status, acts, said):
    host = Host(**status)
    assert made(host).unload("chat", "a game") == said
    assert host.asked == ([("unload", "chat", "a game", False)] if acts else [])


def test_a_model_that_jobs_wait_for_is_not_unloaded_under_them():
    host = Host(state="loading", pid=7, queued=2)
    with pytest.raises(Refused, match="chat is being loaded: 2 jobs wait for it") as refusal:
        made(host).unload("chat", "a game")
    assert refusal.value.status == 409
    assert host.asked == []


@pytest.mark.parametrize(
    ("status", "now", "asked", "said"),
    [
        ({}, False, [("preload", "chat")], "chat is being loaded."),
        (LOADED, False, [("unload", "chat", "stale", True)], "chat is loaded anew now."),
        ({**LOADED, "running": 2}, False, [("unload", "chat", "stale", True)], "chat is loaded anew after 2 jobs."),
        ({**LOADED, "running": 2}, True, [("unload", "chat", "stale", True)], "chat is loaded anew now."),
        ({"state": "loading", "pid": 7, "queued": 1}, False, [("preload", "chat")], "chat is being loaded."),
    ],
)
def test_restart(status, now, asked, said):
    host, stopped = Host(**status), []
    assert made(host, stopped).restart("chat", "stale", now=now) == said
    assert host.asked == asked
    if not now:
        assert stopped == []


def test_a_restart_at_once_gives_its_jobs_back_to_be_tried_again():
    stopped: list[tuple[set[str], Fault]] = []
    made(Host(**LOADED, running=1), stopped).restart("chat", "stale", now=True)
    ((models, fault),) = stopped
    assert models == {"chat"}
    assert fault.may_retry
    assert "restarted: stale" in fault.message


def offer() -> Offer:
    return Offer(kind="llm", model="chat", params=b"{}", deadline_ms=0)


async def test_every_attempt_of_a_job_that_runs_is_cancelled():
    ledger, cancelled = Ledger(), []
    for job, attempt in (("j-1", 1), ("j-1", 2), ("j-2", 1)):
        ledger.record(Claim(job, attempt, offer(), None))
    jobs = LinkJobs(ledger, lambda *asked: cancelled.append(asked))
    assert list(jobs.running()) == ["j-1", "j-2"]
    assert jobs.cancel("j-1", "mine") == 2
    assert cancelled == [("j-1", 1, "mine"), ("j-1", 2, "mine")]
    ledger.get("j-2", 1).end = Fail(fault=Fault("cancelled", "It is over."))
    assert jobs.cancel("j-2", "mine") == 0, "it has ended, and waits only for its acknowledgement"
    assert jobs.cancel("j-9", "mine") == 0
