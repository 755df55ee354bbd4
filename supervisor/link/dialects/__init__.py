"""The ways in which coordinators speak, by the name that `coordinator.dialect` gives them."""

from __future__ import annotations

from supervisor.link.dialects.base import Dialect
from supervisor.link.dialects.goliat import GOLIAT
from supervisor.link.dialects.native import NATIVE
from supervisor.link.dialects.studio import STUDIO

DIALECTS: dict[str, Dialect] = {"native": NATIVE, "studio": STUDIO, "goliat": GOLIAT}
