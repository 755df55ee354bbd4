"""One order to a lane: start this instance, on these devices."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import msgspec
import trio

from supervisor.host.work import ModelSpec


class Order:
    """An instance that the lane was told to start, and what was told of it.

    Args:
        number: of the instance.
        shares: device -> bytes that it may take there; empty where nothing is known of its devices.

    Attributes:
        spec: the model's, with the devices that it was given.
        dropped: why it is not wanted any more, while it is not loaded; "" while it is.
        leaves, nearly, accepts: what was told of it to whoever decides.
    """

    def __init__(self, number: int, spec: ModelSpec, shares: Mapping[str, int]) -> None:
        self.number, self.shares = number, shares
        devices = [uuid for uuid in spec.model.devices if uuid in shares]
        devices += [uuid for uuid in shares if uuid not in devices]
        options = dict(spec.model.options)
        if len(shares) > 1:  # shares as they were reckoned with: by itself a library goes by what is free just then
            options.setdefault("tensor_split", [round(shares[uuid] / 2**20, 3) for uuid in devices])
        model = msgspec.structs.replace(spec.model, devices=tuple(devices) or spec.model.devices, options=options)
        self.spec = msgspec.structs.replace(spec, model=model)
        self.dropped = ""
        self.leaves = self.nearly = False
        self.accepts = True
        self._scope: trio.CancelScope | None = None

    @contextlib.contextmanager
    def wanted(self) -> Iterator[None]:
        """A block that ends early when the order is dropped."""
        with trio.CancelScope() as self._scope:
            if self.dropped:
                self._scope.cancel()
            yield

    def drop(self, reason: str) -> None:
        """It is not wanted any more."""
        self.dropped = reason
        if self._scope is not None:
            self._scope.cancel()
