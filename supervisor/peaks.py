"""What models took of the GPU earlier, kept on disk, and what an estimate needs when nothing was learned yet."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import trio

from supervisor.host.work import ModelSpec
from supervisor.intake.placement import CONTEXT_BYTES
from supervisor.intake.residency import DEFAULT_TOKENS
from supervisor.state import write_atomically

log = logging.getLogger(__name__)

# Entries kept; the oldest go first. A box has tens of models, each with a few configurations over time.
MOST = 500
# One smaller peak lowers what was learned by at most this share: a short life sees less than a long one.
_FORGET = 0.25
# Stands for a device in the peaks of models that lay on several.
SPLIT = "split"


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What an estimate is made of.

    Attributes:
        key: names files, configuration and device; another key, another peak.
        file_bytes: size of all files of the model.
        kv_tokens: tokens whose keys and values it keeps; 0 for engines without.
    """

    key: str
    file_bytes: int = 0
    kv_tokens: int = 0


async def facts_of(spec: ModelSpec) -> Facts:
    """Look at the model's files, in a thread: a folder may lie on a slow disk.

    Cancellation: at once; a disk that is gone for good must not hold up the supervisor's end.
    """
    return await trio.to_thread.run_sync(read_facts, spec, abandon_on_cancel=True)


def read_facts(spec: ModelSpec) -> Facts:
    """Look at the model's files. A file that is gone counts nothing: the load says so better."""
    model = spec.model
    files = sorted((role, name, *_stat(name)) for path in model.files.items() for role, name in _below(*path))
    plain = [spec.engine.name, spec.engine.module, model.backend, model.device, model.options]
    named = [model.revision] if model.revision else files
    digest = hashlib.sha256(msgspec.msgpack.encode([plain, named], order="deterministic"))
    return Facts(
        key=digest.hexdigest()[:32],
        file_bytes=sum(size for _role, _name, size, _mtime in files),
        kv_tokens=_kv_tokens(spec),
    )


def _kv_tokens(spec: ModelSpec) -> int:
    if "llm" not in spec.model.kinds:
        return 0
    options = spec.model.options
    tokens, slots = options.get("n_ctx", DEFAULT_TOKENS), options.get("slots", 1)
    return tokens * slots if isinstance(tokens, int) and isinstance(slots, int) else DEFAULT_TOKENS


def _below(role: str, path: str) -> Iterator[tuple[str, str]]:
    if not os.path.isdir(path):
        yield role, path
        return
    for folder, _folders, names in os.walk(path):
        yield from ((role, os.path.join(folder, name)) for name in names)


def _stat(path: str) -> tuple[int, int]:
    try:
        stat = os.stat(path)
    except OSError:
        return 0, 0
    return stat.st_size, stat.st_mtime_ns


def whole_need(held: Mapping[str, int]) -> Mapping[str, int]:
    """What an instance held, as a peak to learn: what lay on several devices counts as lying on one of them."""
    if len(held) < 2:
        return held
    return {SPLIT: sum(held.values()) - (len(held) - 1) * CONTEXT_BYTES}


class Peaks:
    """Peaks by key and device. A file that is lost or broken costs only estimates.

    Args:
        path: a small JSON file in the state folder.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._peaks: dict[str, dict[str, int]] = {}
        try:
            self._peaks = msgspec.json.decode(path.read_bytes(), type=dict[str, dict[str, int]])
        except FileNotFoundError:
            pass  # the first life
        except (OSError, msgspec.MsgspecError) as error:
            log.warning("what models took of the GPU earlier is lost: %s: %s", path, error)

    def most(self, key: str, devices: Sequence[str]) -> int | None:
        """The largest peak on any of these devices, or on any at all when there are none; None when never seen."""
        seen = self._peaks.get(key, {})
        found = [count for uuid, count in seen.items() if not devices or uuid in devices or uuid == SPLIT]
        return max(found, default=None)

    def learn(self, key: str, held: Mapping[str, int]) -> None:
        """Remember what an instance held at most; written only when it changes."""
        old = self._peaks.get(key, {})
        new = old | {uuid: max(count, int(old.get(uuid, 0) * (1 - _FORGET))) for uuid, count in held.items()}
        if new == old:
            return
        self._peaks.pop(key, None)
        self._peaks[key] = new
        for oldest in list(self._peaks)[:-MOST]:
            del self._peaks[oldest]
        try:
            write_atomically(self._path, msgspec.json.encode(self._peaks))
        except OSError as error:
            log.warning("what models take of the GPU cannot be kept: %s", error)
