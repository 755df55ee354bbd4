"""Reads the GPUs of this machine in a child of its own, because a hung driver hangs whoever asks it.

    python -I reader.py                 one line a second until the input ends (line.py)
    python -I reader.py --once          one JSON object: GPUs, driver, whether CUDA answers (supervisor.machine.gpu)
    python -I reader.py --try-cuda UUID one JSON object: whether a kernel runs on that GPU

Started by its path, so that nothing of the supervisor need be importable. Nothing but these lines is ever written
to descriptor 1, whatever a driver library prints. Events are read on a second thread: NVML's wait for them does not
hold up the readings, nor the other way round. A reader that hangs says nothing more, and is ended for it.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from typing import Any

INTERVAL_S = 1.0


def main() -> None:
    """Entry point; what is missing is told on the line, and the exit code is 0."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--try-cuda", metavar="UUID", default="")
    parser.add_argument("--interval", type=float, default=INTERVAL_S)
    args = parser.parse_args()
    from engines.telemetry.line import die_with_parent, take_line

    die_with_parent()
    line = take_line()
    if args.once:
        line.send(read_machine())
    elif args.try_cuda:
        line.send(try_cuda(args.try_cuda))
    else:
        watch(line, args.interval)
    os._exit(0)  # no library destructors


def watch(line: Any, interval_s: float) -> None:
    """Readings and events until the input ends; returns at once, having said so, when there is no GPU."""
    from engines.telemetry import line as lines
    from engines.telemetry import nvml as reading
    from engines.telemetry.faults import Faults

    try:
        nvml = reading.open_nvml()
        gpus = reading.Gpus(nvml)
    except Exception as error:
        line.send({"t": "none", "error": reading.sentence(error)})
        return
    if not len(gpus):
        line.send({"t": "none", "error": "NVML lists no GPU"})
        return
    questions = lines.Questions()
    questions.listen()
    faults = Faults(nvml, gpus.handles)
    faults.start(line.send)
    asked = 0
    while True:
        began = time.monotonic()
        about = {"driver": gpus.driver, "cuda": gpus.cuda, "events": faults.missing}
        line.send({"t": "reading", "asked": asked, **about, "gpus": gpus.read()})
        time.sleep(max(0.0, began + lines.MIN_GAP_S - time.monotonic()))
        asked = questions.wait(asked, max(0.0, began + interval_s - time.monotonic()))


def read_machine() -> dict[str, Any]:
    """Everything as plain data; see `supervisor.machine.gpu.Machine` for the fields."""
    from engines.telemetry.cuda import cuda_error
    from engines.telemetry.nvml import sentence

    found: dict[str, Any] = {"os": sys.platform, "arch": platform.machine(), "wsl2": is_wsl2(), "gpus": []}
    try:
        _read_nvml(found)
    except Exception as error:
        found["error"] = sentence(error)
    found["cuda_error"] = cuda_error() if found["gpus"] else "no GPU is listed"
    return found


def _read_nvml(found: dict[str, Any]) -> None:
    from engines.telemetry import nvml as reading

    nvml = reading.open_nvml()
    try:
        found["driver"] = reading.text(nvml.nvmlSystemGetDriverVersion())
        found["cuda_max"] = reading.cuda_version(nvml)
        found["gpus"] = [
            {"index": index, "missing": {"uuid": reading.sentence(handle)}}
            if isinstance(handle, Exception)
            else reading.gpu_once(nvml, handle, index)
            for index, handle in enumerate(reading.handles(nvml))
        ]
    finally:
        nvml.nvmlShutdown()


def try_cuda(uuid: str) -> dict[str, Any]:
    """Run a kernel on one GPU."""
    from engines.telemetry.cuda import exercise

    os.environ["CUDA_VISIBLE_DEVICES"] = uuid  # before libcuda is loaded
    return {"uuid": uuid, "error": exercise()}


def is_wsl2() -> bool:
    """Whether this Linux is WSL2: its driver belongs to Windows and must not be installed inside."""
    try:
        with open("/proc/sys/kernel/osrelease") as file:
            return "microsoft" in file.read().lower()
    except OSError:
        return False


def own_folder_first() -> None:
    """Make `engines` of this very installation importable: an isolated interpreter looks nowhere near its program."""
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))


if __name__ == "__main__":
    own_folder_first()
    main()
