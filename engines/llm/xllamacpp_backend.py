"""The default backend: llama.cpp's own server in this process, with slots and continuous batching."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engines.llm import conversation
from engines.llm.answer import Answer, Pace
from engines.llm.backend import Options, check_memory, host_memory_bytes, ready
from engines.llm.grammar import NativeParser, check_grammar
from engines.runtime import xllama
from engines.runtime.contract import CancelledRun, Job, Model
from engines.runtime.gguf import Header
from protocol.faults import FaultError, refuse
from protocol.work import LlmParams

_SEEDS = 2**32 - 1  # llama.cpp's seeds have 32 bits, the last of them means "any"


class XllamacppBackend:
    """One `xllamacpp.Server`."""

    def __init__(self, model: Model, path: Path, header: Header, options: Options, scratch: Path) -> None:
        """Load. Raises FaultError, ImportError."""
        gpu_memory = sum(device["memory_total"] for device in xllama.gpus())
        check_memory(options, header, host_memory_bytes() + gpu_memory)
        self._has_template = bool(header.chat_template or options.chat_template)
        self._server = xllama.LlamaServer(_parameters(path, options), scratch, model.device)
        self._parses = NativeParser(xllama.native_library())
        self.n_ctx: int = self._server.props["default_generation_settings"]["n_ctx"]
        caps = self._server.props.get("chat_template_caps", {})
        self._native_tools = bool(caps.get("supports_tools") and caps.get("supports_tool_calls"))
        offload = self._server.offload
        layers = {"gpu_layers": offload.layers, "layers": offload.total} if offload.total else {}
        self.ready = ready(
            header,
            self.n_ctx,
            device=offload.device,
            slots=options.slots,
            versions={"xllamacpp": xllama.version()},
            vram_bytes=self._server.vram_bytes,
            limits=layers,
        )

    def check(self, params: LlmParams) -> None:
        """Refuse what this model cannot do. Raises FaultError naming the field."""
        if params.messages is not None and not self._has_template:
            raise refuse(
                "unsupported",
                "messages: this model has no chat template; use a plain prompt, or set options.chat_template.",
                "messages",
            )
        if conversation.active_tools(params) and not self._native_tools and not conversation.must_call(params):
            raise refuse("unsupported", "tools: this model's chat template has no place for tools.", "tools")
        if params.grammar is not None:
            check_grammar(params.grammar, self._parses)
        elif (schema := conversation.schema_of(params)) is not None:
            self._try_schema(schema, "json_schema")
        elif conversation.must_call(params):
            self._try_schema(conversation.forced_schema(params), "tools")

    def _try_schema(self, schema: dict[str, Any], field: str) -> None:
        """A schema is known to be good only when a sampler was made of it: answer one token under it."""
        body = {
            "messages": [{"role": "user", "content": "x"}],
            "max_tokens": 1,
            "stream": True,
            "cache_prompt": False,
            "response_format": response_format(schema),
        }
        try:
            self._server.stream(body, lambda _chunk: False, chat=True)
        except FaultError as error:
            if error.fault.code != "invalid_request":
                raise
            raise refuse("invalid_parameter", f"{field}: {error.fault.message}", field) from None

    def count(self, params: LlmParams) -> int:
        """Tokens of the prompt, template included. Raises FaultError when the template refuses the messages."""
        if params.prompt is not None:
            return len(self._server.tokenize(params.prompt))
        try:
            rendered = self._server.call("POST", "/apply-template", self._body(params))
        except FaultError as error:
            field = "tools" if conversation.active_tools(params) else "messages"
            raise refuse("invalid_parameter", f"{field}: {error.fault.message}", field) from None
        return len(self._server.tokenize(rendered["prompt"]))

    def run(self, params: LlmParams, job: Job, answer: Answer) -> dict[str, float]:
        """Generate; a cancel is seen at the next chunk, in a long prompt at the next batch of it."""
        pace, tokens = Pace(job), 0
        usage: dict[str, Any] = {}

        def on_chunk(chunk: dict[str, Any]) -> bool:
            nonlocal usage, tokens
            if progress := chunk.get("prompt_progress"):
                pace.tick(progress["processed"], progress["total"], "prefill")
            elif chunk["choices"]:
                tokens += 1
                pace.tick(tokens, params.max_tokens, "decode")
                take_choice(chunk["choices"][0], answer, params.top_logprobs)
            usage = chunk.get("usage") or usage
            return job.cancelled.is_set()

        self._server.stream(self._body(params), on_chunk, chat=params.messages is not None)
        if job.cancelled.is_set() and not answer.finish_reason:
            raise CancelledRun
        return usage_of(usage)

    def _body(self, params: LlmParams) -> dict[str, Any]:
        return request_body(params, native_tools=self._native_tools)

    def answer(self, params: LlmParams, job: Job) -> Answer:
        """An empty answer for this request."""
        return Answer(job, forced=conversation.must_call(params))


def request_body(params: LlmParams, *, native_tools: bool) -> dict[str, Any]:
    """The request in llama.cpp's words. What was not asked for is left to the model's own defaults."""
    body: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}, "return_progress": True}
    for name in ("max_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty"):
        if (value := getattr(params, name)) is not None:
            body[name] = value
    if params.seed is not None:
        body["seed"] = params.seed % _SEEDS
    if params.stop:
        body["stop"] = params.stop
    if params.grammar is not None:
        body["grammar"] = params.grammar
    if params.messages is None:
        body["prompt"] = params.prompt
        if params.logprobs:
            body["logprobs"] = max(1, params.top_logprobs)
    else:
        body |= _chat_fields(params, native_tools)
    return body


def response_format(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema in OpenAI's words.

    Only the chat route makes a grammar of it by llama.cpp's own converter. The completion route hands it to a
    library that ignores a schema which it cannot read, and lets a weak model write blanks without end.
    """
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def _chat_fields(params: LlmParams, native_tools: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {"messages": conversation.plain_messages(params)}
    must_call = conversation.must_call(params)
    schema = conversation.forced_schema(params) if must_call else conversation.schema_of(params)
    if params.logprobs:
        fields |= {"logprobs": True, "top_logprobs": max(1, params.top_logprobs)}
    if schema is not None:
        fields["response_format"] = response_format(schema)
    if params.chat_template_kwargs:
        fields["chat_template_kwargs"] = params.chat_template_kwargs
    tools = conversation.active_tools(params)
    if tools and native_tools:
        # llama.cpp's "required" lets the model talk instead of calling, and it knows no choice by name: a call that
        # must come is bound by the schema, and the tools are only shown to the model.
        fields |= {"tools": tools, "tool_choice": "none" if must_call else "auto"}
    return fields


def take_choice(choice: dict[str, Any], answer: Answer, top: int = 0) -> None:
    """Put one streamed choice, of a chat or of a plain completion, into the answer.

    Args:
        top: how many alternatives of each token were asked for; llama.cpp gives at least one.
    """
    delta = choice.get("delta") or {"content": choice.get("text")}
    entries = [
        {**_without_id(entry), "top_logprobs": [_without_id(other) for other in entry.get("top_logprobs", [])[:top]]}
        for entry in (choice.get("logprobs") or {}).get("content") or ()
    ]
    answer.add(
        content=delta.get("content") or "",
        reasoning=delta.get("reasoning_content") or "",
        tool_calls=delta.get("tool_calls") or (),
        logprobs=entries,
    )
    if choice.get("finish_reason"):
        answer.finish(choice["finish_reason"])


def _without_id(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in ("id", "top_logprobs")}


def usage_of(usage: dict[str, Any]) -> dict[str, float]:
    """llama.cpp's usage in the keys of `work.USAGE_KEYS`."""
    found = {name: float(usage.get(name, 0)) for name in ("prompt_tokens", "completion_tokens")}
    if cached := (usage.get("prompt_tokens_details") or {}).get("cached_tokens"):
        found["cached_tokens"] = float(cached)
    return found


def _parameters(path: Path, options: Options) -> Any:
    import xllamacpp  # type: ignore[import-untyped]

    params = xllama.parameters(options.threads)
    params.model.path = str(path)
    params.n_ctx = options.n_ctx * options.slots  # llama.cpp divides it among the slots
    params.n_parallel = options.slots
    params.cont_batching = True
    params.n_batch, params.n_ubatch = options.n_batch, min(options.n_ubatch, options.n_batch)
    params.n_gpu_layers = options.n_gpu_layers
    params.main_gpu = options.main_gpu
    if options.tensor_split:
        unused = [0.0] * (len(params.tensor_split) - len(options.tensor_split))
        params.tensor_split = [*options.tensor_split, *unused]
    params.cache_ram_mib = options.prompt_cache_mib
    if options.flash_attn is not None:
        kinds = xllamacpp.llama_flash_attn_type
        on, off = kinds.LLAMA_FLASH_ATTN_TYPE_ENABLED, kinds.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.flash_attn_type = on if options.flash_attn else off
    if not options.use_mmap:
        params.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_NONE
    if options.chat_template:
        params.chat_template = options.chat_template
    kinds = xllamacpp.ggml_type
    params.cache_type_k = params.cache_type_v = getattr(kinds, f"GGML_TYPE_{options.cache_type.upper()}")
    return params
