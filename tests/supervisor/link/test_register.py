from __future__ import annotations

import sys

import msgspec

from protocol.engine_wire import Model
from supervisor.host.work import EngineSpec, InstanceStatus, ModelSpec
from supervisor.link.register import Proof, capabilities, model_offers, model_states


def spec(name: str) -> ModelSpec:
    engine = EngineSpec(name="llm", module="engines.llm.engine", python=sys.executable)
    return ModelSpec(name=name, engine=engine, model=Model(name=name, kinds=("llm",), device="auto"))


SPECS = [spec("proved"), spec("pending"), spec("broken"), spec("failed")]
PROOFS = {
    "proved": Proof(ok=True, revision="r1"),
    "broken": Proof(ok=False, reason="its file is damaged"),
    "failed": Proof(ok=True),
}
SNAPSHOT = [
    InstanceStatus(model="proved", engine="llm", state="ready", slots=4, device="cuda:0", limits={"n_ctx": 4096}),
    InstanceStatus(model="failed", engine="llm", state="backoff", reason="no memory", blocked=True),
]


def test_only_what_works_is_announced():
    (offer,) = model_offers(SPECS, PROOFS, SNAPSHOT)
    assert (offer.name, offer.slots, offer.resident, offer.device) == ("proved", 4, True, "cuda:0")
    assert (offer.revision, offer.limits, offer.kinds) == ("r1", {"n_ctx": 4096}, ("llm",))


def test_a_cold_model_is_announced_with_what_is_known_before_a_load():
    (offer,) = model_offers(SPECS[:1], PROOFS, [InstanceStatus(model="proved", engine="llm", state="cold")])
    assert (offer.slots, offer.resident, offer.device) == (1, False, "auto")
    assert model_offers(SPECS[:1], PROOFS, [])[0].slots == 1


def test_admission_learns_why_a_model_is_not_available():
    states = model_states(SPECS, PROOFS, SNAPSHOT)
    assert {name: state.reason for name, state in states.items()} == {
        "proved": "",
        "pending": "it is still being checked",
        "broken": "its file is damaged",
        "failed": "no memory",
    }
    assert states["proved"].available
    assert not states["failed"].available


def test_capabilities_say_why_no_jobs_are_taken():
    made = capabilities((), labels={"rack": "1"}, machine="Linux", version="1", not_accepting="it drains")
    assert (made.accepting, made.reason, made.labels) == (False, "it drains", {"rack": "1"})
    assert capabilities((), labels={}, machine="", version="").accepting
    small = capabilities((), labels={}, machine="", version="", vram_threshold_gb=8.0)
    assert small.vram_threshold_gb == 8.0


def test_a_cordoned_kind_is_announced_by_nobody_and_refused_with_its_reason():
    """A model that serves other kinds as well goes on with those."""
    proofs = {"chat": Proof(ok=True, revision="r1")}
    chat = spec("chat")
    chat = msgspec.structs.replace(chat, model=msgspec.structs.replace(chat.model, kinds=("llm", "rerank")))
    held = {"rerank": ("held by the operator (rerank)", 5.0)}
    (offer,) = model_offers([chat], proofs, [], cordons=lambda _spec: held)
    assert offer.kinds == ("llm",)
    state = model_states([chat], proofs, [], cordons=lambda _spec: held)["chat"]
    assert state.available
    assert (state.held, state.held_ms) == ({"rerank": "held by the operator (rerank)"}, {"rerank": 5000})
    every = {kind: ("held by the operator", None) for kind in chat.model.kinds}
    assert model_offers([chat], proofs, [], cordons=lambda _spec: every) == ()
    assert model_states([chat], proofs, [], cordons=lambda _spec: every)["chat"].held_ms == {}
