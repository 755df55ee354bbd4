"""The second backend: llama-cpp-python, one request at a time.

Facts that shape it (llama-cpp-python 0.3.36): with `verbose=False` it points descriptors 1 and 2 at /dev/null while it
loads, so it is loaded verbose with a log callback of ours; a malformed grammar ends the process, so none reaches a
sampler unchecked; `create_completion` decodes the whole answer again for every token and cannot be cancelled in a
prompt, so the loop over `generate` is ours.
"""

from __future__ import annotations

import ctypes
import json
import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engines.llm import conversation
from engines.llm.answer import Answer, Pace
from engines.llm.backend import MIN_P, TEMPERATURE, TOP_K, TOP_P, Options, check_memory, host_memory_bytes, ready
from engines.llm.grammar import NativeParser, check_grammar
from engines.llm.text import TextStream
from engines.runtime.contract import CancelledRun, Job, Model
from engines.runtime.gguf import Header
from engines.runtime.llama_log import Offload, load_sentence, offload_of
from protocol.faults import FaultError, refuse
from protocol.work import LlmParams

_SEEDS = 2**32 - 1
_PIECE_BYTES = 256
_LOG_WARN, _LOG_ERROR = 3, 4  # ggml's log levels
_LOG_KEPT = 2000  # lines of a load
_GGML_TYPES = {"f16": 1, "q8_0": 8, "q4_0": 2, "bf16": 30}


class LlamaCppPythonBackend:
    """One `llama_cpp.Llama`."""

    def __init__(self, model: Model, path: Path, header: Header, options: Options, scratch: Path) -> None:
        """Load. Raises FaultError, ImportError."""
        import llama_cpp

        self._library: Any = llama_cpp
        self._log = _Log(llama_cpp)
        has_gpu = bool(llama_cpp.llama_supports_gpu_offload())
        if model.device.startswith("cuda") and not has_gpu:
            raise refuse(
                "cpu_fallback",
                "device: this build of llama-cpp-python was compiled without GPU support.",
                "device",
                hint='Build it with CMAKE_ARGS="-DGGML_CUDA=on" in this engine\'s interpreter.',
            )
        if not has_gpu:
            check_memory(options, header, host_memory_bytes())
        self._llama: Any = self._load(path, options, 0 if model.device == "cpu" else options.n_gpu_layers)
        self._vocab = llama_cpp.llama_model_get_vocab(self._llama.model)
        self._parses = NativeParser(llama_cpp.llama_cpp._lib)
        self._template = self._formatter(options.chat_template or header.chat_template)
        self._lock = threading.Lock()
        self._running: tuple[Job, Pace] | None = None
        # The reference must live as long as the context: C keeps only the address.
        self._abort = llama_cpp.ggml_abort_callback(self._aborted)
        llama_cpp.llama_set_abort_callback(self._llama.ctx, self._abort, None)
        self._ticks = 0
        self.n_ctx: int = self._llama.n_ctx()
        offload = offload_of(self._log.text(), has_gpu=has_gpu, taken=0)
        self.ready = ready(
            header,
            self.n_ctx,
            device=offload.device,
            slots=1,
            versions={"llama-cpp-python": llama_cpp.__version__},
            limits=_layers(offload),
        )

    def _load(self, path: Path, options: Options, gpu_layers: int) -> Any:
        cache_type = _GGML_TYPES[options.cache_type]
        try:
            llama = self._library.Llama(
                str(path),
                n_ctx=options.n_ctx,
                n_batch=min(options.n_batch, options.n_ctx),
                n_ubatch=min(options.n_ubatch, options.n_batch, options.n_ctx),
                n_threads=options.threads,
                n_threads_batch=options.threads,
                n_gpu_layers=gpu_layers,
                main_gpu=options.main_gpu,
                tensor_split=list(options.tensor_split) or None,
                offload_kqv=gpu_layers != 0,
                op_offload=gpu_layers != 0,
                flash_attn=bool(options.flash_attn),
                type_k=cache_type,
                type_v=cache_type,
                use_mmap=options.use_mmap,
                no_perf=True,
                verbose=True,
            )
        except (ValueError, RuntimeError, AssertionError) as error:
            raise refuse("load_failed", load_sentence(self._log.text(), str(error)), "files.model") from None
        llama.verbose = False  # from here on it would only print a line per request
        return llama

    def _formatter(self, template: str) -> Any:
        if not template:
            return None
        special = [self._token_text(token) for token in (self._llama.token_eos(), self._llama.token_bos())]
        try:
            return self._library.llama_chat_format.Jinja2ChatFormatter(template, *special)
        except Exception as error:
            raise refuse(
                "load_failed", f"The chat template does not compile: {error}.", "options.chat_template"
            ) from None

    def _token_text(self, token: int) -> str:
        if token < 0:
            return ""
        text: bytes = self._library.llama_vocab_get_text(self._vocab, token)
        return text.decode(errors="replace")

    # ---- before a run

    def check(self, params: LlmParams) -> None:
        """Refuse what this library cannot do. Raises FaultError naming the field."""
        if params.messages is not None and self._template is None:
            raise refuse(
                "unsupported",
                "messages: this model has no chat template; use a plain prompt, or set options.chat_template.",
                "messages",
            )
        if conversation.active_tools(params) and not conversation.must_call(params):
            raise refuse(
                "unsupported",
                "tools: llama-cpp-python cannot read tool calls out of free text; "
                "set tool_choice to a function or to required, or use the backend xllamacpp.",
                "tools",
            )
        self._grammar(params)

    def _grammar(self, params: LlmParams) -> str:
        """The grammar that the answer must meet, checked; "" when it is free. Raises FaultError."""
        if params.grammar is not None:
            check_grammar(params.grammar, self._parses)
            return params.grammar
        must_call = conversation.must_call(params)
        schema = conversation.forced_schema(params) if must_call else conversation.schema_of(params)
        if schema is None:
            return ""
        field = "tools" if must_call else "json_schema"
        try:
            grammar: str = self._library.llama_grammar.json_schema_to_gbnf(json.dumps(schema))
        except Exception as error:  # the converter trips over a bad schema in many ways
            text = " ".join(str(error).split())[:200]
            raise refuse("invalid_parameter", f"{field}: the schema cannot be used: {text}.", field) from None
        check_grammar(grammar, self._parses, field)
        return grammar

    def count(self, params: LlmParams) -> int:
        """Tokens of the prompt, template included. Raises FaultError when the template refuses the messages."""
        return len(self._tokens(params))

    def _tokens(self, params: LlmParams) -> list[int]:
        if params.prompt is not None:
            return self._tokenize(params.prompt)
        try:
            rendered: str = self._template(
                messages=conversation.plain_messages(params),
                tools=conversation.active_tools(params) or None,
                **params.chat_template_kwargs,
            ).prompt
        except FaultError:
            raise
        except Exception as error:  # templates raise what they like
            text = " ".join(str(error).split())[:200]
            sentence = f"messages: the model's chat template refuses them: {text}."
            raise refuse("invalid_parameter", sentence, "messages") from None
        return self._tokenize(rendered.removeprefix(self._token_text(self._llama.token_bos())))

    def _tokenize(self, text: str) -> list[int]:
        tokens: list[int] = self._llama.tokenize(text.encode(), add_bos=True, special=True)
        return tokens

    # ---- a run

    def answer(self, params: LlmParams, job: Job) -> Answer:
        """An empty answer for this request."""
        return Answer(job, forced=conversation.must_call(params))

    def run(self, params: LlmParams, job: Job, answer: Answer) -> dict[str, float]:
        """Generate; a cancel is seen at the next token, in a prompt at the next operation of the graph (CPU)."""
        with self._lock:
            self._ticks = 0
            self._running = (job, Pace(job))
            try:
                return self._generate(params, job, answer)
            except RuntimeError:
                if job.cancelled.is_set():  # llama_decode says 2: aborted
                    raise CancelledRun from None
                raise
            finally:
                self._running = None
                if job.cancelled.is_set():
                    self._llama.reset()

    def _generate(self, params: LlmParams, job: Job, answer: Answer) -> dict[str, float]:
        prompt = self._tokens(params)
        limit = params.max_tokens or self.n_ctx - len(prompt)
        text, pace, pending = TextStream(params.stop), Pace(job), []
        made, reason = 0, "length"
        for token in self._sample(params, prompt):
            job.check_cancelled()
            made += 1
            pace.tick(made, params.max_tokens, "decode")
            if self._library.llama_vocab_is_eog(self._vocab, token):
                reason = "stop"
                break
            piece = self._piece(token)
            if params.logprobs:
                pending.append(self._logprob(token, piece, params.top_logprobs))
            if ready_text := text.feed(piece):
                answer.add(content=ready_text, logprobs=pending)
                pending = []
            if text.stopped:
                reason = "stop"
                break
            if made >= limit:
                break
        if rest := text.feed(b"", final=True):
            answer.add(content=rest, logprobs=pending)
        answer.finish(reason)
        return {"prompt_tokens": float(len(prompt)), "completion_tokens": float(made)}

    def _sample(self, params: LlmParams, prompt: list[int]) -> Iterator[int]:
        grammar = self._grammar(params)
        self._llama.set_seed(params.seed % _SEEDS if params.seed is not None else random.getrandbits(31))
        tokens: Iterator[int] = self._llama.generate(
            prompt,
            temp=_or(params.temperature, TEMPERATURE),
            top_k=_or(params.top_k, TOP_K),
            top_p=_or(params.top_p, TOP_P),
            min_p=_or(params.min_p, MIN_P),
            presence_penalty=_or(params.presence_penalty, 0.0),
            frequency_penalty=_or(params.frequency_penalty, 0.0),
            repeat_penalty=1.0,
            grammar=self._library.LlamaGrammar.from_string(grammar, verbose=False) if grammar else None,
        )
        return tokens

    def _aborted(self, _data: object) -> bool:
        """Asked by llama.cpp between operations of a graph: whether to give up. Counts them as work done."""
        running = self._running
        if running is None:
            return False
        job, pace = running
        self._ticks += 1
        pace.tick(self._ticks, None, "compute")
        return job.cancelled.is_set()

    def _piece(self, token: int) -> bytes:
        size = _PIECE_BYTES
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = self._library.llama_token_to_piece(self._vocab, token, buffer, size, 0, False)
            if length >= 0:
                return buffer.raw[:length]
            size = -length

    def _logprob(self, token: int, piece: bytes, top: int) -> dict[str, Any]:
        """OpenAI's entry for the token just sampled, from the logits that it was sampled from."""
        import numpy as np

        raw = self._library.llama_get_logits_ith(self._llama.ctx, -1)
        logits = np.ctypeslib.as_array(raw, shape=(self._llama.n_vocab(),)).astype(np.float64)
        peak = logits.max()
        logprobs = logits - peak - np.log(np.exp(logits - peak).sum())
        best = np.argsort(-logprobs)[:top]

        def entry(id_: int, data: bytes) -> dict[str, Any]:
            return {"token": data.decode(errors="replace"), "bytes": list(data), "logprob": float(logprobs[id_])}

        return {**entry(token, piece), "top_logprobs": [entry(int(id_), self._piece(int(id_))) for id_ in best]}


def _or(value: float | None, default: float) -> Any:
    return default if value is None else value


def _layers(offload: Offload) -> dict[str, int]:
    return {"gpu_layers": offload.layers, "layers": offload.total} if offload.total else {}


class _Log:
    """llama.cpp's log: the lines of a load are kept, warnings and errors go to stderr."""

    def __init__(self, library: Any) -> None:
        self._lines: list[str] = []
        self._callback = library.llama_log_callback(self._take)
        library.llama_log_set(self._callback, ctypes.c_void_p(0))

    def _take(self, level: int, text: bytes, _data: object) -> None:
        line = text.decode(errors="replace")
        if len(self._lines) < _LOG_KEPT:
            self._lines.append(line)
        if level in (_LOG_WARN, _LOG_ERROR):
            sys.stderr.write(line)

    def text(self) -> str:
        """Everything logged while the model loaded."""
        return "".join(self._lines)
