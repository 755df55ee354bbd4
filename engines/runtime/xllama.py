"""xllamacpp (llama.cpp's server as a wheel) behind one typed file: one server, its socket, where it really runs.

Shared by the engines that load GGUF files. Facts that shape it (xllamacpp 2026.10):

- The server opens an HTTP listener of its own, by default on a TCP port. A host name that ends in `.sock` makes it a
  Unix socket: it lies in the instance's private scratch folder, and no port is open.
- Its Python calls cover inference only; tokenising and rendering a chat template go through that socket.
- A failed load raises one fixed sentence; the reason is in the log alone. So the log of a load goes to a file as well.
- Destroying a `Server` right after making it hung for over a minute: the process is ended instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engines.runtime.llama_log import load_sentence, offload_of, one_line
from protocol.faults import FaultError, refuse

_SOCKET_NAME = "x.sock"
_MAX_SOCKET_PATH = 100  # bytes; the kernel takes 107
_HTTP_TIMEOUT_S = 60.0  # for tokenising and templates, which never wait for a slot
_QUIET, _LOAD_DETAILS = 1, 4  # llama.cpp's log verbosity: errors only; what went to which device

# Log names of the C++ functions: looked up softly, a build without them only loses words.
_LOG_MAIN = "_Z15common_log_mainv"
_LOG_FILE = "_Z19common_log_set_fileP10common_logPKc"
_LOG_FLUSH = "_Z16common_log_flushP10common_log"
_LOG_LEVEL = "_Z30common_log_set_verbosity_tholdi"

# Error types of llama.cpp's server -> our codes.
_CODES = {
    "exceed_context_size_error": "context_length_exceeded",
    "invalid_request_error": "invalid_request",
    "not_supported_error": "unsupported",
    "not_found_error": "unsupported",
}


def version() -> str:
    """Version of xllamacpp. Raises ImportError."""
    import xllamacpp  # type: ignore[import-untyped]

    return str(xllamacpp.__version__)


def gpus() -> list[dict[str, Any]]:
    """GPUs that this build of llama.cpp can use; empty for a CPU build. Raises ImportError."""
    import xllamacpp

    kinds = xllamacpp.ggml_backend_dev_type
    wanted = (kinds.GGML_BACKEND_DEVICE_TYPE_GPU, kinds.GGML_BACKEND_DEVICE_TYPE_IGPU)
    return [device for device in xllamacpp.get_device_info() if device["type"] in wanted]


def claimed_devices() -> tuple[str, ...]:
    """Devices for `Claims`."""
    return ("cpu", "cuda") if gpus() else ("cpu",)


def parameters(threads: int) -> Any:
    """A fresh `CommonParams`, quiet and without what an engine must not have (web page, host RAM cache).

    Args:
        threads: CPU threads; all slots share them.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.ui = False
    params.warmup = False
    params.ctx_shift = False  # never drop the start of a conversation silently
    params.cache_ram_mib = 0  # the default keeps up to 8 GiB of old prompts in host memory
    params.prefill_assistant = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    return params


def native_library() -> ctypes.CDLL:
    """The C library inside the wheel. Raises ImportError."""
    import xllamacpp

    return ctypes.CDLL(xllamacpp.xllamacpp.__file__)


class LlamaServer:
    """One loaded model. Calls are safe from several threads; as many run at once as there are slots.

    Attributes:
        offload: where the layers really are.
        vram_bytes: GPU memory that the load took, as seen by the library; other programs' use may be in it.
        props: what the server says of the model (`n_ctx`, template capabilities, …).
    """

    def __init__(self, params: Any, scratch: Path, device: str) -> None:
        """Load.

        Args:
            params: from `parameters`, with the model and its options set; listener and log are set here.
            scratch: private folder for the socket and the log of the load.
            device: "cpu", "cuda" or "auto". "cpu" keeps everything off the GPUs.

        Raises:
            FaultError: `cpu_fallback` when CUDA is asked of a build that has none, or `load_failed`.
        """
        import xllamacpp

        found = gpus()
        if device.startswith("cuda") and not found:
            raise refuse(
                "cpu_fallback",
                "device: this build of xllamacpp was compiled without GPU support.",
                "device",
                hint="Install the CUDA wheel of xllamacpp in this engine's interpreter.",
            )
        self._socket = _socket_path(scratch)
        params.hostnames = [self._socket]
        params.verbosity = _LOAD_DETAILS if found else _QUIET
        if device == "cpu":
            params.n_gpu_layers, params.no_kv_offload, params.no_op_offload = 0, True, True
        with _LoadLog(scratch / "load.log") as log:
            try:
                self._server: Any = xllamacpp.Server(params)
            except Exception as error:
                raise refuse("load_failed", load_sentence(log.text(), str(error)), "files.model") from None
            text = log.text()
        self.vram_bytes = _vram_taken(found)
        self.offload = offload_of(text, has_gpu=bool(found), taken=self.vram_bytes)
        self.props: dict[str, Any] = self.call("GET", "/props")

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """One request over the private socket; for what has no Python call.

        Raises:
            FaultError: the server refused, translated by `fault_of_error`.
        """
        connection = _UnixConnection(self._socket)
        try:
            payload = json.dumps(body).encode() if body is not None else None
            connection.request(method, path, payload, {"Content-Type": "application/json"})
            answer = json.loads(connection.getresponse().read() or b"null")
        finally:
            connection.close()
        if isinstance(answer, dict) and "error" in answer:
            raise fault_of_error(answer["error"])
        return answer

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of a text, as the model would see it."""
        body = {"content": text, "add_special": add_special, "parse_special": parse_special}
        tokens: list[int] = self.call("POST", "/tokenize", body)["tokens"]
        return tokens

    def stream(self, body: Mapping[str, Any], on_chunk: Callable[[dict[str, Any]], bool], *, chat: bool) -> None:
        """Generate; `on_chunk` gets each OpenAI chunk and returns True to stop the generation.

        Raises:
            FaultError: the server refused the request or failed.
            Exception: whatever `on_chunk` raised, after the generation was stopped.
        """
        raised: list[BaseException] = []

        def guarded(chunk: Any) -> bool:
            # An exception must not travel through the C++ frames that call us.
            try:
                if isinstance(chunk, dict) and "error" in chunk:
                    raise fault_of_error(chunk["error"])
                return on_chunk(chunk)
            except BaseException as error:
                raised.append(error)
                return True

        ask = self._server.handle_chat_completions if chat else self._server.handle_completions
        answer = _translated(ask, dict(body), guarded)
        if raised:
            raise raised[0]
        if isinstance(answer, dict) and "error" in answer:
            raise fault_of_error(answer["error"])

    def embeddings(self, body: Mapping[str, Any]) -> Any:
        """The answer of the embeddings route. Raises FaultError."""
        answer = _translated(self._server.handle_embeddings, dict(body))
        if isinstance(answer, dict) and "error" in answer:
            raise fault_of_error(answer["error"])
        return answer


def _translated(call: Callable[..., Any], *args: Any) -> Any:
    """Errors that llama.cpp finds while reading a request come as exceptions, not as error bodies."""
    try:
        return call(*args)
    except ValueError as error:
        raise refuse("invalid_request", f"llama.cpp refused the request: {one_line(str(error))}.") from None


def fault_of_error(error: Any) -> FaultError:
    """Translate an error body of llama.cpp's server; the one table for it is `_CODES`."""
    if not isinstance(error, dict):
        return refuse("engine_failed", f"llama.cpp failed: {one_line(str(error))}.")
    sentence = one_line(str(error.get("message", "")))
    code = _CODES.get(str(error.get("type")), "engine_failed")
    detail = {key: error[key] for key in ("n_prompt_tokens", "n_ctx") if key in error}
    return refuse(code, f"llama.cpp refused the request: {sentence}.", **detail)


_VRAM_NOISE = 64 * 2**20  # a CUDA context alone is larger


def _vram_taken(before: list[dict[str, Any]]) -> int:
    """By how many bytes the free memory of the GPUs fell since `before` was read."""
    if not before:
        return 0
    taken = sum(device["memory_free"] for device in before) - sum(device["memory_free"] for device in gpus())
    return taken if taken > _VRAM_NOISE else 0


class _LoadLog:
    """Copies llama.cpp's log into a file while a model loads; lines still go to stderr as well.

    All four functions or none: one of them called with a null log would end the process.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._on = False
        library, pointer = native_library(), ctypes.c_void_p
        with contextlib.suppress(AttributeError):
            main = ctypes.CFUNCTYPE(pointer)((_LOG_MAIN, library))
            self._set_file = ctypes.CFUNCTYPE(None, pointer, ctypes.c_char_p)((_LOG_FILE, library))
            self._flush = ctypes.CFUNCTYPE(None, pointer)((_LOG_FLUSH, library))
            self._set_level = ctypes.CFUNCTYPE(None, ctypes.c_int)((_LOG_LEVEL, library))
            self._log = main()
            self._on = bool(self._log)

    def __enter__(self) -> _LoadLog:
        if self._on:
            self._set_file(self._log, os.fsencode(self._path))
        return self

    def __exit__(self, *_: object) -> None:
        if self._on:
            self._set_file(self._log, None)
            self._set_level(_QUIET)

    def text(self) -> str:
        """Everything logged so far; "" when this build has no such log."""
        if not self._on:
            return ""
        self._flush(self._log)
        try:
            return self._path.read_text(errors="replace")
        except OSError:
            return ""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_HTTP_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_HTTP_TIMEOUT_S)
        self.sock.connect(self._path)


def _socket_path(scratch: Path) -> str:
    """Where the listener goes: relative when the absolute path is too long for a socket address."""
    path = scratch / _SOCKET_NAME
    path.unlink(missing_ok=True)  # left by an earlier life; bind would fail
    for name in (str(path), "./" + os.path.relpath(path)):
        if len(os.fsencode(name)) <= _MAX_SOCKET_PATH:
            return name
    raise refuse("load_failed", f"The folder {scratch} has a path too long for a socket; use a shorter state_dir.")
