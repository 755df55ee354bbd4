"""What the engine asks of a library, and the load options that both read alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Protocol

import msgspec
from msgspec import Meta

from engines.embed.vectors import POOLINGS
from engines.runtime.contract import Job, Model, Outcome, Ready, known_options, option, refuse
from engines.runtime.threads import threads_of
from protocol.work import EmbeddingParams

COMMON_OPTIONS = ("batch_size", "matryoshka", "threads", "max_tokens", "pooling")


class Backend(Protocol):
    """One loaded model.

    Attributes:
        dimensions: components of a full vector.
        max_tokens: longest text, special tokens included.
    """

    ready: Ready
    dimensions: int
    max_tokens: int

    def lengths(self, items: Sequence[Any]) -> list[int]:
        """Tokens of each text or token list. Raises FaultError for a token that the model does not have."""

    def run(self, job: Job) -> Outcome:
        """Embed. Raises CancelledRun, FaultError."""

    def cancel(self, job: Job) -> None:
        """Wake a running library call."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Load options: `[models.options]`.

    Attributes:
        batch_size: most texts per call of the library.
        matryoshka: the model was trained so that the first components of a vector stand alone.
        threads: CPU threads.
        max_tokens: longest text; None means what the model says.
        pooling: None means what the model says, else the mean.
    """

    batch_size: int = 32
    matryoshka: bool = False
    threads: int = 1
    max_tokens: int | None = None
    pooling: str | None = None


def read_options(model: Model, more: Sequence[str] = ()) -> Options:
    """Check the options that both backends have. `more` names the others. Raises FaultError naming the option."""
    known_options(model, [*COMMON_OPTIONS, *more])
    pooling = option(model, "pooling", str | None, None)
    if pooling is not None and pooling not in POOLINGS:
        sentence = f"options.pooling: expected one of {', '.join(POOLINGS)}."
        raise refuse("load_failed", sentence, "options.pooling")
    return Options(
        batch_size=option(model, "batch_size", Annotated[int, Meta(ge=1, le=2048)], 32),
        matryoshka=option(model, "matryoshka", bool, False),
        threads=threads_of(model),
        max_tokens=option(model, "max_tokens", Annotated[int, Meta(ge=8, le=2**24)], None),
        pooling=pooling,
    )


def check_request(params: EmbeddingParams, backend: Backend, *, matryoshka: bool) -> None:
    """Refuse what this model cannot embed; nothing is ever cut off. Raises FaultError naming the field."""
    wanted = params.dimensions
    if wanted is not None and wanted > backend.dimensions:
        sentence = f"dimensions: this model makes {backend.dimensions}, not {wanted}."
        raise refuse("invalid_parameter", sentence, "dimensions")
    if wanted is not None and wanted < backend.dimensions and not matryoshka:
        raise refuse(
            "unsupported",
            f"dimensions: this model makes vectors of {backend.dimensions} that must not be shortened; "
            "set options.matryoshka if it was trained for that.",
            "dimensions",
        )
    for index, length in enumerate(backend.lengths(params.input)):
        if length == 0:
            raise refuse("invalid_parameter", f"input.{index}: the text has no tokens.", f"input.{index}")
        if length > backend.max_tokens:
            raise refuse(
                "context_length_exceeded",
                f"input.{index}: {length} tokens exceed this model's limit of {backend.max_tokens}. Shorten the text.",
                f"input.{index}",
                n_prompt_tokens=length,
                n_ctx=backend.max_tokens,
            )


def check_vocabulary(items: Sequence[Any], n_vocab: int) -> None:
    """Refuse token ids that the model does not have: some libraries read beyond their tables. Raises FaultError."""
    for index, item in enumerate(items):
        if isinstance(item, list) and (highest := max(item)) >= n_vocab:
            sentence = f"input.{index}: token {highest} is outside this model's vocabulary of {n_vocab}."
            raise refuse("invalid_parameter", sentence, f"input.{index}")
