"""Which settings of a running supervisor follow its files, and how each change is put into force.

What has no applier here waits for a restart, and `supervisor config` says so. A key stands here only when its applier
really changes what the supervisor does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec

from supervisor import notices
from supervisor.reload import Applier
from supervisor.reload_plan import Change
from supervisor.settings import Settings


def appliers(read: Callable[[], Settings], write: Callable[[Settings], None]) -> Mapping[str, Applier]:
    """Key -> applier.

    Args:
        read: the settings in force.
        write: puts others into force: whoever reads them next sees them, and what is announced is made anew.
    """

    async def level(new: Settings, _changes: Sequence[Change]) -> None:
        notices.set_level(new.log.level)

    async def drain(new: Settings, _changes: Sequence[Change]) -> None:
        limits = msgspec.structs.replace(read().limits, drain_s=new.limits.drain_s)
        write(msgspec.structs.replace(read(), limits=limits))

    async def labels(new: Settings, _changes: Sequence[Change]) -> None:
        worker = msgspec.structs.replace(read().worker, labels=new.worker.labels)
        write(msgspec.structs.replace(read(), worker=worker))

    return {"log.level": level, "limits.drain_s": drain, "worker.labels": labels}
