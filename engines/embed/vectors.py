"""What happens to vectors and batches whatever library made them. Pure, on numpy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from protocol.faults import refuse
from protocol.work import EmbeddingResult

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

POOLINGS = ("mean", "cls", "last")


def pool(states: Array, mask: Array, how: str) -> Array:
    """One vector per text from one per token.

    Args:
        states: (texts, tokens, dimensions).
        mask: (texts, tokens), 1 where there is a token; padding is on the right.
        how: "mean" over the tokens, "cls" for the first, "last" for the last token.
    """
    import numpy as np

    if how == "cls":
        return states[:, 0]
    if how == "last":
        last: Array = states[np.arange(len(states)), mask.sum(1) - 1]
        return last
    weights = mask[:, :, None].astype(np.float32)
    pooled: Array = (states.astype(np.float32) * weights).sum(1) / weights.sum(1)
    return pooled


def normalised(rows: Array) -> Array:
    """Rows of length 1 as little-endian float32.

    Raises:
        FaultError: `engine_failed` when a row has no direction: the model is broken.
    """
    import numpy as np

    rows = rows.astype(np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not np.isfinite(lengths).all() or (lengths == 0).any():
        raise refuse("engine_failed", "The model made a vector without a direction (zero or not a number).")
    unit: Array = (rows / lengths).astype("<f4")
    return unit


def result(rows: Array, dimensions: int | None) -> EmbeddingResult:
    """Normalise, shorten when asked (matryoshka models: the first components are an embedding of their own), pack."""
    wanted = dimensions or rows.shape[1]
    unit = normalised(rows[:, :wanted])
    return EmbeddingResult(count=len(unit), dimensions=wanted, vectors=unit.tobytes())


def batches(lengths: Sequence[int], *, rows: int, tokens: int) -> Iterator[list[int]]:
    """Cut a request into batches of indices, short texts first so that little is padding.

    Args:
        lengths: tokens of each text.
        rows: most texts of one batch.
        tokens: most tokens of one batch, padding included; a single longer text is a batch of its own.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) == rows or (len(batch) + 1) * lengths[index] > tokens):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
