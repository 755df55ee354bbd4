"""What this box serves at this moment: the configured models, as their proofs, the host and the machine let them be."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from protocol.link_wire import ModelOffer
from supervisor.box import Box
from supervisor.host.work import InstanceStatus, ModelSpec
from supervisor.intake.admission import ModelState
from supervisor.link import register
from supervisor.link.register import Proof


class Served:
    """See the module.

    Attributes:
        instances: `Host.snapshot`, once there is a host.
    """

    def __init__(self, specs: Sequence[ModelSpec], box: Box) -> None:
        self.specs, self._box = specs, box
        self.instances: Callable[[], Sequence[InstanceStatus]] = list
        self._proofs: dict[str, Proof] = {}

    def proved(self, name: str, proof: Proof) -> None:
        """What the checks found out about a model."""
        self._proofs[name] = proof

    def states(self) -> dict[str, ModelState]:
        """As admission sees them."""
        box = self._box
        return register.model_states(self.specs, self._proofs, self.instances(), box.barred, box.cordons)

    def offers(self) -> tuple[ModelOffer, ...]:
        """As they are announced."""
        box = self._box
        return register.model_offers(self.specs, self._proofs, self.instances(), box.barred, box.cordons)

    def why_not(self, model: str) -> str:
        """Why a model is not served; "" when it is."""
        state = self.states().get(model)
        return "" if state is None or state.available else state.reason

    def refused(self) -> dict[str, str]:
        """Model -> why it is not served."""
        return {name: f"not served: {state.reason}" for name, state in self.states().items() if not state.available}
