"""What a store keeps of deployments: what is wanted, which workers there are, and how far each has come."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from coordinator.deploy.plan import Changes
from coordinator.deploy.spec import Asked, Candidate, Deployment, Placement
from protocol.link_wire import Capabilities

Plan = Callable[[Deployment, Sequence[Placement], Mapping[str, Candidate]], Changes]


class Standing(NamedTuple):
    """How far all deployments are.

    Attributes:
        placements: those that are shown, by deployment, revision and worker.
        settled: nothing is to be planned.
        now_ms: by the store's clock.
    """

    deployments: Sequence[Deployment]
    placements: Sequence[Placement]
    settled: bool
    now_ms: int


Wish = Callable[[Deployment | None], Asked]


class Deployments(Protocol):
    """The part of a store that all coordinators over it plan with together. Raises StoreError, as all of it does."""

    def deploy(self, name: str, wish: Wish) -> Deployment:
        """Ask for a model to be served, or for another revision, number or choice of workers of it.

        Args:
            wish: what is asked for, given the deployment that there is; nobody changes it meanwhile. What it raises
                is raised, and changes nothing. It may be called more than once.
        """

    def undeploy(self, name: str) -> Deployment | None:
        """Ask for no worker any more; the row goes when nobody who is here has anything of it. None: there is none."""

    def deployments(self) -> list[Deployment]:
        """All, by name."""

    def placements(self, worker: str | None = None) -> list[Placement]:
        """All, or those of one worker; without those that wait for a worker which was not here for an hour."""

    def seen(self, worker: str, capabilities: Capabilities, *, draining: bool) -> None:
        """A worker is connected to this coordinator and announces this."""

    def lost(self, worker: str) -> None:
        """Its session with this coordinator is over."""

    def present(self) -> set[str]:
        """The workers of which is written down that they are connected to this coordinator."""

    def all_lost(self) -> None:
        """This coordinator has just begun: whoever was connected to its last life is not."""

    def candidates(self) -> dict[str, Candidate]:
        """All workers, those included that were here in the last hour."""

    def standing(self, plan: Plan) -> Standing:
        """What there is, and whether `plan` would change some of it. Only reads."""

    def replan(self, plan: Plan) -> list[Deployment]:
        """Apply what `plan` says of every deployment; one coordinator at a time per deployment. All that are left."""

    def redirect(self) -> int:
        """Let queued jobs wait for who answers now, see `now_called`; how many were moved."""

    def placed(self, placement: Placement, was: Sequence[str]) -> bool:
        """Write how far a placement is, when it is still in one of the states `was`."""

    def unplaced(self, placement: Placement) -> None:
        """Its worker has let go of it."""
