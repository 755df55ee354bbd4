"""onnxruntime behind one typed file: sessions, where they really run, and how a run is stopped.

Shared by the engines that run ONNX graphs. onnxruntime is imported inside the functions, so that a machine without
it can still import this module.

Facts that shape it (onnxruntime 1.31): a provider that cannot start is dropped with a log line and the CPU serves
instead, `get_device()` and `get_available_providers()` say what was compiled in and not what works, and only
`RunOptions.terminate` stops a run; it is looked at between nodes, never inside one.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from engines.runtime.contract import CancelledRun
from protocol.faults import FaultError, refuse

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"

_ERRORS_ONLY = 3  # log severity; warnings speak of graph optimisations that nobody acts on
_SENTENCE_CHARS = 400  # characters of a library message that go into a fault
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


class Port(msgspec.Struct, frozen=True):
    """One input or output of a graph.

    Attributes:
        shape: sizes; a name or None where the size is free.
        dtype: numpy's name of the element type, or onnxruntime's own words where numpy has none.
    """

    name: str
    shape: tuple[int | str | None, ...]
    dtype: str


class Terminator:
    """Stops the runs of one job from another thread; give the same one to each run of the job.

    Once terminated it stays so: a run that begins later ends at once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: list[Any] = []
        self._terminated = threading.Event()

    @property
    def terminated(self) -> bool:
        """Whether `terminate` was called."""
        return self._terminated.is_set()

    def terminate(self) -> None:
        """Make the runs in flight return after the node they are in; safe from any thread, never blocks."""
        with self._lock:
            self._terminated.set()
            for options in self._running:
                options.terminate = True

    def _begin(self, options: Any) -> None:
        with self._lock:
            options.terminate = self._terminated.is_set()
            self._running.append(options)

    def _end(self, options: Any) -> None:
        with self._lock:
            self._running = [other for other in self._running if other is not options]


class Session:
    """A loaded graph. Make it with `open_session`; `run` may be called from several threads at once.

    Attributes:
        path: the model file.
        device: where the graph really runs: "cpu", or "cuda:0" when at least one node was placed on the GPU.
        placement: provider -> number of nodes, empty where the library cannot tell.
        inputs: the graph's inputs by name.
        outputs: the graph's outputs by name.
    """

    def __init__(self, path: Path, inner: Any) -> None:
        self.path = path
        self._inner = inner
        self.placement = _placement(inner)
        self.device = _executed(inner, self.placement)
        self.inputs = {port.name: port for port in map(_port, inner.get_inputs())}
        self.outputs = {port.name: port for port in map(_port, inner.get_outputs())}
        self.metadata: dict[str, str] = dict(inner.get_modelmeta().custom_metadata_map)

    def run(
        self,
        outputs: Sequence[str] | None,
        feeds: Mapping[str, Array],
        job_terminate: Terminator | None = None,
    ) -> list[Array]:
        """Run the graph.

        Args:
            outputs: names of the outputs wanted; None means all, in the graph's order.
            feeds: input name -> array.
            job_terminate: stops this run from another thread.

        Raises:
            CancelledRun: `job_terminate` was used.
            FaultError: `out_of_memory`, or `engine_failed` with the library's sentence.
        """
        import onnxruntime  # type: ignore[import-untyped]

        options = onnxruntime.RunOptions()
        terminator = job_terminate or Terminator()
        terminator._begin(options)
        try:
            found: list[Array] = self._inner.run(list(outputs) if outputs is not None else None, dict(feeds), options)
        except Exception as error:
            if terminator.terminated:
                raise CancelledRun from None
            raise _failed_run(error, self.path) from error
        finally:
            terminator._end(options)
        if terminator.terminated:
            raise CancelledRun
        return found


def open_session(path: Path, device: str, *, threads: int = 1) -> Session:
    """Load a graph.

    Args:
        path: the .onnx file; external weights lie beside it.
        device: "cpu", "cuda", or "auto" (CUDA when it works, else the CPU). With "cuda" the CPU provider stays in
            the list, because real graphs hold nodes that only it has: compare `Session.device` with what was asked.
        threads: CPU threads inside one node, the caller's included; runs at once share them.

    Raises:
        FaultError: `load_failed`, or `out_of_memory`.
        ImportError: onnxruntime is not installed.
    """
    import onnxruntime

    if not path.is_file():
        raise refuse("load_failed", f"{path} does not exist or is not a file.", "files.model")
    options = _session_options(onnxruntime, threads)
    providers = _providers(onnxruntime, device)
    try:
        inner = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:
        raise _failed_load(error, path) from error
    return Session(path, inner)


def version() -> str:
    """Version of the installed onnxruntime. Raises ImportError."""
    import onnxruntime

    return str(onnxruntime.__version__)


def claimed_devices() -> tuple[str, ...]:
    """Devices that the installed build was compiled for: a claim, not a proof. Raises ImportError."""
    import onnxruntime

    return ("cpu", "cuda") if CUDA in onnxruntime.get_available_providers() else ("cpu",)


def _session_options(onnxruntime: Any, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Spinning threads win microseconds and take whole cores from the other engines of the box.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Makes `get_provider_graph_assignment_info` answer; unknown keys are ignored by older builds.
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return options


def _providers(onnxruntime: Any, device: str) -> list[Any]:
    """CUDA before CPU where CUDA is wanted and compiled in; asking for one that is not only warns."""
    if device == "cpu" or CUDA not in onnxruntime.get_available_providers():
        return [CPU]
    preload = getattr(onnxruntime, "preload_dlls", None)
    if preload is not None:  # finds cuBLAS and cuDNN in the nvidia-* wheels of this venv
        preload()
    cuda = {
        # The default doubles the arena each time and keeps up to half of the GPU for nothing.
        "arena_extend_strategy": "kSameAsRequested",
        # The default tries every algorithm at each new shape: seconds for the first image of a size.
        "cudnn_conv_algo_search": "HEURISTIC",
    }
    return [(CUDA, cuda), CPU]


def _placement(inner: Any) -> dict[str, int]:
    """Provider -> nodes after graph partitioning; {} where this build cannot say."""
    ask = getattr(inner, "get_provider_graph_assignment_info", None)
    if ask is None:
        return {}
    counts: dict[str, int] = {}
    try:
        for part in ask():
            counts[part.ep_name] = counts.get(part.ep_name, 0) + len(part.get_nodes())
    except Exception:  # evidence only: no answer is an answer
        return {}
    return counts


def _executed(inner: Any, placement: Mapping[str, int]) -> str:
    on_gpu = inner.get_providers()[0] == CUDA and (not placement or placement.get(CUDA, 0) > 0)
    return "cuda:0" if on_gpu else "cpu"  # the first GPU that this process sees, see device.py


def _port(node: Any) -> Port:
    return Port(node.name, tuple(node.shape), _DTYPES.get(node.type, node.type))


def _sentence(error: Exception) -> str:
    """The library's words without its banner: `[ONNXRuntimeError] : 7 : INVALID_PROTOBUF : …`."""
    text = " ".join(str(error).split())
    if text.startswith("[ONNXRuntimeError]"):
        text = text.split(" : ", 3)[-1]
    return text[:_SENTENCE_CHARS].rstrip(". ")


def _out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or "failed to allocate" in text or "bad_alloc" in text


def _failed_load(error: Exception, path: Path) -> FaultError:
    if _out_of_memory(error):
        return refuse("out_of_memory", f"There is not enough memory to load {path.name}: {_sentence(error)}.")
    return refuse("load_failed", f"onnxruntime cannot load {path}: {_sentence(error)}.", "files.model")


def _failed_run(error: Exception, path: Path) -> FaultError:
    if _out_of_memory(error):
        return refuse("out_of_memory", f"There is not enough memory to run {path.name}: {_sentence(error)}.")
    return refuse("engine_failed", f"onnxruntime could not run {path.name}: {_sentence(error)}.")


__all__ = ["CPU", "CUDA", "Port", "Session", "Terminator", "claimed_devices", "open_session", "version"]
