"""A running coordinator for the whole session, and workers whose answers each test writes."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import openai
import pytest
from httpx._config import DEFAULT_TIMEOUT_CONFIG

from coordinator.register import known
from coordinator.services import Limits
from coordinator.testing import FakeWorker, Running, Script, running
from protocol.link_wire import ModelOffer
from tests.coordinator.studio_rig import FAST, House, opened

PATIENCE_S = 60.0
_numbers = itertools.count(1)

Serve = Callable[..., FakeWorker]


@pytest.fixture(scope="session", autouse=True)
def _a_busy_machine_is_no_outage() -> Iterator[None]:
    """Answers may take as long as they take where everything runs on two cores; what is too late is tried on purpose.

    httpx gives up after 5 s unless it is told otherwise, and stores and registers sooner.
    """
    with pytest.MonkeyPatch.context() as patch:
        for step in ("connect", "read", "write", "pool"):
            patch.setattr(DEFAULT_TIMEOUT_CONFIG, step, PATIENCE_S)
        patch.setattr(known, "ANSWER_S", PATIENCE_S)
        if importlib.util.find_spec("psycopg_pool") is not None:
            from coordinator.store import postgres_link

            patch.setattr(postgres_link, "CONNECTION_S", PATIENCE_S)
            patch.setitem(postgres_link.CONNECT, "connect_timeout", int(PATIENCE_S))
        yield


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The real coordinator on a free port; comment lines come quickly so that tests can see them."""
    with running(tmp_path_factory.mktemp("coordinator"), Limits(comment_s=0.2)) as it:
        yield it


@pytest.fixture
def http(served: Running) -> Iterator[httpx.Client]:
    """Plain HTTP with the client key."""
    with httpx.Client(base_url=served.url, headers=served.headers, timeout=PATIENCE_S) as client:
        yield client


@pytest.fixture
def ai(served: Running) -> Iterator[openai.OpenAI]:
    """The official client, without retries so that every fault is seen once."""
    with openai.OpenAI(base_url=served.url + "/v1", api_key=served.key, max_retries=0, timeout=PATIENCE_S) as client:
        yield client


@pytest.fixture
def serve(served: Running) -> Iterator[Serve]:
    """`serve(script, "model", "kind", …)` connects a worker that serves the model by the script."""
    with ExitStack() as stack:

        def start(script: Script, model: str, *kinds: str, slots: int = 4, **announced: Any) -> FakeWorker:
            offer = ModelOffer(name=model, kinds=kinds, engine="fake", slots=slots)
            return stack.enter_context(FakeWorker(served, (offer,), script, f"fake-{next(_numbers)}", **announced))

        yield start


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A coordinator whose sessions with studio workers have fast times."""
    with running(tmp_path_factory.mktemp("studio"), studio=FAST) as it:
        yield it


@pytest.fixture
def house(there: Running) -> Iterator[House]:
    """The same for one test, with names of models of its own."""
    with opened(there) as it:
        yield it
