"""Who asks, in scripts/replicas: single streams, and a crowd of clients that notices every word that is missing."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import httpx
import openai
from replicas_parts import TALK

PATIENCE_S = 120.0
SHORT_WORDS = 40
CLIENTS = 3
LEAST_STREAMS = 3  # of each client, so that the upgrade is seen by all


def client(url: str, key: str, retries: int = 0) -> openai.OpenAI:
    """The official client; a new connection per request, so that each goes where the proxy says."""
    once = {"connection": "close"}
    return openai.OpenAI(
        base_url=f"{url}/v1", api_key=key, max_retries=retries, timeout=PATIENCE_S, default_headers=once
    )


def asking(url: str, key: str) -> httpx.Client:
    """For routes that the official client has not."""
    headers = {"authorization": f"Bearer {key}"}
    limits = httpx.Limits(max_keepalive_connections=0)
    return httpx.Client(base_url=url, headers=headers, timeout=PATIENCE_S, trust_env=False, limits=limits)


def words(name: str, count: int) -> str:
    """A text in which every word is its own, so that none can be lost or doubled unseen."""
    return " ".join(f"{name}-{number}" for number in range(count))


def pieces(asked: openai.OpenAI, text: str, name: str) -> Iterator[str]:
    """The stream of a model that says `text` back, piece by piece."""
    stream = asked.chat.completions.create(
        model=TALK,
        messages=[{"role": "user", "content": text}],
        stream=True,
        extra_headers={"idempotency-key": name},  # a retry must not make a second job
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            yield chunk.choices[0].delta.content


class Crowd:
    """Clients that ask for one stream after another, through the proxy, until they are told to stop.

    Attributes:
        whole: streams that came whole, of each client.
        slowest_s: the longest wait for a stream's first word.
        wrong: sentences about those that did not.
    """

    def __init__(self, url: str, key: str) -> None:
        self.whole: list[int] = [0] * CLIENTS
        self.slowest_s = 0.0
        self.wrong: list[str] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(url, key, who)) for who in range(CLIENTS)]

    def __enter__(self) -> Crowd:
        """Begin."""
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Let each stream come to its end."""
        self._over.set()
        for thread in self._threads:
            thread.join(2 * PATIENCE_S)
        self.wrong += ["a stream did not come to its end" for thread in self._threads if thread.is_alive()]

    def _ask(self, url: str, key: str, who: int) -> None:
        with client(url, key, retries=8) as asked:
            number = 0
            while not self._over.is_set() or number < LEAST_STREAMS:
                number += 1
                name = f"client{who}-{number}"
                text = words(name, SHORT_WORDS)
                said, began = "", time.monotonic()
                try:
                    for piece in pieces(asked, text, name):
                        self.slowest_s = self.slowest_s if said else max(self.slowest_s, time.monotonic() - began)
                        said += piece
                except Exception as error:  # whatever it is: the story is told by the main thread
                    self.wrong.append(f"the stream {name} broke: {error}")
                    return
                if said.split() != text.split():
                    self.wrong.append(f"the stream {name} is not whole: {len(said.split())} of {SHORT_WORDS} words")
                self.whole[who] += 1
