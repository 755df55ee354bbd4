"""What is open with whose key: worker sessions and answers on their way. A revocation closes all of it at once."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator


class Doors:
    """Open things, each with a way to end it. Belongs to the event loop.

    Args:
        lives: whether what a name stands for (a key's prefix, a worker's id) is admitted still.
    """

    def __init__(self, lives: Callable[[str], bool]) -> None:
        self._lives = lives
        self._open: dict[str, dict[int, Callable[[], None]]] = {}
        self._numbers = itertools.count()

    @contextlib.contextmanager
    def hold(self, name: str, end: Callable[[], None]) -> Iterator[None]:
        """Something is open under this name as long as the block lasts; `end` must not wait.

        `end` is called when the name is not admitted any more, also when that is so already.
        """
        number = next(self._numbers)
        self._open.setdefault(name, {})[number] = end
        try:
            if not self._lives(name):
                end()
            yield
        finally:
            ends = self._open[name]
            del ends[number]
            if not ends:
                del self._open[name]

    def look(self) -> None:
        """End what is open under names that are not admitted any more."""
        for name in [name for name in self._open if not self._lives(name)]:
            for end in list(self._open[name].values()):
                end()
