"""What this box serves at this moment: its models, as their proofs, the host and the machine let them be."""

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
        self._specs, self._box = list(specs), box
        self.instances: Callable[[], Sequence[InstanceStatus]] = list
        self._proofs: dict[str, Proof] = {}

    def take_on(self, spec: ModelSpec) -> None:
        """One more model, which is not proved yet."""
        self._specs.append(spec)

    def let_go(self, name: str) -> None:
        """One model less."""
        self._specs[:] = [spec for spec in self._specs if spec.name != name]
        self._proofs.pop(name, None)

    def sort(self, names: Sequence[str]) -> None:
        """Put the models into this order; others come behind them."""
        places = {name: place for place, name in enumerate(names)}
        self._specs.sort(key=lambda spec: places.get(spec.name, len(places)))

    @property
    def specs(self) -> Sequence[ModelSpec]:
        """All models that have lanes. The same list for good: it shows those that come and go."""
        return self._specs

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
