"""A Gradio app's image endpoint: current apps (POST, then events) and old ones (one POST).

Apps answer in many shapes: a data URL, a relative URL, an object with `url` and `path`, the same inside `image` of
a gallery, or the old object with `name` and `is_file`. Files are fetched from the app itself only.
"""

from __future__ import annotations

import json
import re
import secrets
from typing import Any
from urllib.parse import quote

from engines.runtime.contract import FaultError, Job, Outcome, refuse
from engines.server import calls
from engines.server.calls import Call
from engines.server.config import Config, Gradio
from engines.server.openai import image_outcome, no_start_image, save_picture
from protocol import work
from protocol.faults import Fault

_PLACE = re.compile(r"\{(prompt|negative_prompt|width|height|steps|guidance|seed)\}")


def places(gradio: Gradio) -> set[str]:
    """Names of the places in `data`."""
    return {match[1] for item in gradio.data if isinstance(item, str) for match in _PLACE.finditer(item)}


def validate(config: Config, params: work.ImageParams) -> None:
    """Refuse what the app has no input for, and what it needs and nobody gave. Raises FaultError."""
    known = places(config.gradio)
    for name in ("negative_prompt", "steps", "guidance", "seed"):
        if getattr(params, name) not in (None, "") and name not in known:
            raise refuse("unsupported", f"This app has no input for {name}.", name)
    for name in ("steps", "guidance"):
        if name in known and getattr(params, name) is None and name not in config.gradio.defaults:
            raise refuse("invalid_parameter", f"This app needs {name}.", name)


def run(config: Config, call: Call, job: Job) -> Outcome:
    """One call of the app per picture."""
    params: work.ImageParams = job.params
    no_start_image(job)
    seeded = "seed" in places(config.gradio)
    first = params.seed if params.seed is not None else secrets.randbits(31)
    seeds: list[int] = []
    while len(job.files) < params.n:
        seed = first + len(seeds)
        seeds.append(seed)
        outputs = _ask(config.gradio, call, _data(config.gradio, params, seed), job)
        if not isinstance(outputs, list) or config.gradio.output >= len(outputs):
            raise refuse("engine_failed", f"The app's answer has no output {config.gradio.output}.")
        found = references(outputs[config.gradio.output])
        if not found:
            raise refuse("engine_failed", "The app's answer holds no picture.")
        for reference in found[: params.n - len(job.files)]:
            save_picture(job, _fetch(config.gradio, call, reference), len(job.files))
        job.progress(len(job.files), params.n, "image")
        job.check_cancelled()
    return image_outcome(job, seeds if seeded and len(seeds) == params.n else [])


def _data(gradio: Gradio, params: work.ImageParams, seed: int) -> list[Any]:
    values: dict[str, Any] = {
        "prompt": params.prompt,
        "negative_prompt": params.negative_prompt,
        "width": params.width,
        "height": params.height,
        "steps": params.steps,
        "guidance": params.guidance,
        "seed": seed,
    }
    for name, value in gradio.defaults.items():
        if values.get(name) is None:
            values[name] = value
    return [_filled(item, values) for item in gradio.data]


def _filled(item: Any, values: dict[str, Any]) -> Any:
    if not isinstance(item, str):
        return item
    if whole := _PLACE.fullmatch(item):
        return values[whole[1]]
    return _PLACE.sub(lambda match: str(values[match[1]]), item)


# ---- asking


def _ask(gradio: Gradio, call: Call, data: list[Any], job: Job) -> Any:
    if gradio.protocol == "predict":
        body: dict[str, Any] = {"data": data, "session_hash": secrets.token_hex(6)}
        if gradio.fn_index is not None:
            body["fn_index"] = gradio.fn_index
        return call.json("POST", f"{gradio.prefix}/run/{quote(gradio.endpoint)}", body).get("data")
    path = f"{gradio.prefix}/call/{quote(gradio.endpoint)}"
    event_id = call.json("POST", path, {"data": data}).get("event_id")
    if not isinstance(event_id, str):
        raise refuse("engine_failed", "The app accepted the call without an event_id.")
    with call.open("GET", f"{path}/{quote(event_id, safe='')}") as response:
        calls.checked(response)
        for number, event in enumerate(calls.events(response.iter_bytes()), 1):
            if event.name == "complete":
                return _decoded(event.data)
            if event.name == "error":
                said = _decoded(event.data)
                raise FaultError(Fault("engine_failed", f"The app failed: {said or 'no reason given'}."))
            if event.name == "generating":
                job.progress(number, None, "generating")
            job.check_cancelled()
    job.check_cancelled()
    raise FaultError(Fault("engine_failed", "The app's stream ended before its answer.", retryable=True))


def _decoded(data: str) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        raise refuse("engine_failed", "The app sent an event that is not JSON.") from None


# ---- the answer's shapes


def references(value: Any) -> list[tuple[str, str]]:
    """Every picture of an output value as (kind, text); kind is "url" or "path" (a file on the app's side)."""
    if isinstance(value, str):
        return [("url", value)] if value else []
    if isinstance(value, list):  # a gallery; its items may be [picture, caption]
        return [found for item in value for found in references(item[0] if isinstance(item, list) and item else item)]
    if not isinstance(value, dict):
        return []
    if "image" in value:
        return references(value["image"])
    data = value.get("data")
    if isinstance(data, str) and data.startswith("data:"):
        return [("url", data)]
    url, path = value.get("url"), value.get("path") or value.get("name")
    if isinstance(url, str) and url:
        return [("url", url)] if not isinstance(path, str) else [("url or path", f"{url}\n{path}")]
    return [("path", path)] if isinstance(path, str) and path else []


def _fetch(gradio: Gradio, call: Call, reference: tuple[str, str]) -> bytes:
    kind, text = reference
    url, _, path = text.partition("\n") if kind == "url or path" else (text, "", text)
    if kind == "url or path" and not call.is_ours(url):
        kind = "path"  # the app believes itself elsewhere, behind a proxy say: ask for the file here
    if kind == "path":
        return call.fetch(f"{gradio.prefix}/file={quote(path)}")
    return call.fetch(url)
