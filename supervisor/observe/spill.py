"""Notices models of which a part lies in the box's RAM instead of on the GPU, and says so once a load.

`intake/pace.py` judges; whoever measures an idle, loaded instance hands its memory in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from supervisor.intake.pace import Memory, spill_sentence, spilled

log = logging.getLogger(__name__)


class Spill:
    """See the module.

    Args:
        on_spill: told a model and its bytes in RAM that belong on the GPU, each time it is looked at; 0 when all is
            well.
    """

    def __init__(self, on_spill: Callable[[str, int], None] = lambda _model, _bytes: None) -> None:
        self._on_spill = on_spill
        self._sentences: dict[str, str] = {}

    def seen(self, model: str, memory: Memory) -> None:
        """An instance was measured while it was loaded and idle."""
        self._on_spill(model, spilled(memory))
        sentence = spill_sentence(model, memory)
        if sentence and model not in self._sentences:
            log.warning("%s", sentence)
        elif not sentence and model in self._sentences:
            log.info("%s lies on the GPU again", model)
        if sentence:
            self._sentences[model] = sentence
        else:
            self._sentences.pop(model, None)

    def gone(self, model: str) -> None:
        """The instance ended; its next load is told about anew."""
        self._on_spill(model, 0)
        self._sentences.pop(model, None)

    def sentence(self, model: str) -> str:
        """What is wrong with where this model lies; "" when nothing is known to be."""
        return self._sentences.get(model, "")
