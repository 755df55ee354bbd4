"""Notices models of which a part lies in the box's RAM instead of on the GPU, and says so once a load.

`intake/pace.py` judges; whoever measures an idle, loaded instance hands its memory in. What a load should look like is
either told by the operator or learned here from the fullest load of this life: a peak will not do, because it counts
what jobs took for a moment.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from supervisor.intake.pace import Memory, spill_sentence, spilled

log = logging.getLogger(__name__)

PROC = Path("/proc")


class Spill:
    """See the module.

    Args:
        on_spill: told a model and its bytes in RAM that belong on the GPU, each time it is looked at; 0 when all is
            well.
    """

    def __init__(self, on_spill: Callable[[str, int], None] = lambda _model, _bytes: None) -> None:
        self._on_spill = on_spill
        self._sentences: dict[str, str] = {}
        self._fullest: dict[str, tuple[int, int]] = {}  # model -> on the GPU, in RAM

    def measured(self, model: str, *, on_gpu: int, in_ram: int, told: int = 0) -> None:
        """An instance was measured after its load, before its first run; see `seen` for what follows.

        Args:
            on_gpu, in_ram: bytes; `in_ram` as `anonymous_bytes` counts.
            told: what the operator says that a load takes of the GPU; 0 when he does not.
        """
        full, ram = self._fullest.get(model, (0, 0))
        if on_gpu > full:
            self._fullest[model] = full, ram = on_gpu, in_ram
        # Told more than ever lay there: how much RAM a whole load leaves in use was never seen.
        usual_ram = ram if full >= told else 0
        self.seen(model, Memory(expected=max(told, full), on_gpu=on_gpu, in_ram=in_ram, usual_ram=usual_ram))

    def seen(self, model: str, memory: Memory) -> None:
        """An instance was measured while it was loaded and idle: report what is new about it."""
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


def anonymous_bytes(pids: Iterable[int]) -> int:
    """Anonymous and shared memory of processes; not pages of mapped files, which the kernel may drop.

    0 where the system does not tell (outside Linux), and for processes that are gone.
    """
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError, ValueError):
            for line in (PROC / str(pid) / "status").read_text().splitlines():
                if line.startswith(("RssAnon:", "RssShmem:")):
                    total += int(line.split()[1]) * 1024
    return total
