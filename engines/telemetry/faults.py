"""NVML's events as lines: what the driver says about a GPU in the moment it happens."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from engines.telemetry.nvml import recovery_action, sentence, text

WAIT_MS = 1000
PAUSE_S = 1.0  # after a wait that failed; a lost GPU makes every wait fail at once
# nvml.h, nvmlEventType*; what a driver does not know is left out of the set.
KINDS = {
    0x2: "ecc-double-bit",
    0x8: "xid",
    0x800: "retirement-failure",
    0x2000: "poison-fatal",
    0x4000: "unavailable",
    0x8000: "recovery-action",
}
_RECOVERY_ACTION_FIELD = 230

Send = Callable[[dict[str, Any]], None]


class Faults:
    """The event set of all GPUs.

    Attributes:
        missing: why events are not to be had, for every reading; "" when they are.
    """

    def __init__(self, nvml: Any, gpus: list[tuple[str, Any]]) -> None:
        self._nvml, self._gpus = nvml, gpus
        self._set: Any = None
        self.missing = ""

    def start(self, send: Send) -> None:
        """Register, and wait on a thread of its own; `send` is called on that thread."""
        nvml = self._nvml
        try:
            self._set = nvml.nvmlEventSetCreate()
            watched = sum(self._register(handle) for _uuid, handle in self._gpus)
        except (nvml.NVMLError, AttributeError) as error:
            self.missing = sentence(error)
            return
        if watched:
            threading.Thread(target=self._wait_for_ever, args=(send,), name="events", daemon=True).start()
        elif not self.missing:
            self.missing = "no GPU reports events"

    def _register(self, handle: Any) -> bool:
        nvml = self._nvml
        try:
            wanted = sum(KINDS) & int(nvml.nvmlDeviceGetSupportedEventTypes(handle))
            if wanted:
                nvml.nvmlDeviceRegisterEvents(handle, wanted, self._set)
        except nvml.NVMLError as error:  # WSL2, some laptops, a lost GPU
            self.missing = sentence(error)
            return False
        return bool(wanted)

    def _wait_for_ever(self, send: Send) -> None:
        told = ""
        while True:
            try:
                event = self._nvml.nvmlEventSetWait_v2(self._set, WAIT_MS)
            except self._nvml.NVMLError as error:
                if type(error).__name__ == "NVMLError_Timeout":
                    continue
                if type(error).__name__ == "NVMLError_GpuIsLost" and told != "lost":
                    told = "lost"
                    send({"t": "event", "kind": "lost", "text": sentence(error)})
                time.sleep(PAUSE_S)
                continue
            send(self.describe(event))

    def describe(self, event: Any) -> dict[str, Any]:
        """One event as a line."""
        kind = KINDS.get(int(event.eventType), f"event-0x{int(event.eventType):x}")
        line: dict[str, Any] = {"t": "event", "kind": kind, "uuid": self._uuid(event.device)}
        if kind == "xid":
            line["xid"] = int(event.eventData)
        if kind == "recovery-action":
            line["action"] = self._action(event.device)
        return line

    def _uuid(self, device: Any) -> str:
        try:
            return text(self._nvml.nvmlDeviceGetUUID(device))
        except self._nvml.NVMLError:
            return self._gpus[0][0] if len(self._gpus) == 1 else ""

    def _action(self, device: Any) -> str:
        try:
            (value,) = self._nvml.nvmlDeviceGetFieldValues(device, [_RECOVERY_ACTION_FIELD])
        except self._nvml.NVMLError:
            return ""
        return "" if value.nvmlReturn else recovery_action(int(value.value.uiVal))
