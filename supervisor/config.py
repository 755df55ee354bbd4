"""Reading worker.toml: strict, and all errors at once, each with its place.

Order of strength: defaults < file < drop-ins (`conf.d/*.toml` beside it) < environment (`BULKHEAD__SECTION__KEY`, for
example `BULKHEAD__COORDINATOR__URL`; a list item by its index, `BULKHEAD__MODELS__0__DEVICE`); config_layers.py lays
them over each other. Relative paths belong to the folder of worker.toml, `~` is the home folder. Every error reads

    worker.toml:12: models[0].engine: there is no engine "lmm" (did you mean "llm"?)
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from engines.catalog import CATALOG
from protocol.engine_wire import Model
from protocol.ids import is_safe_id
from supervisor.config_goliat import check_goliat
from supervisor.config_layers import ENV_PREFIX as ENV_PREFIX
from supervisor.config_layers import Layers, Source, read_layers
from supervisor.config_models import Finding, check_engine_options, check_models, warn_models
from supervisor.config_walk import BAD, build, did_you_mean, dotted
from supervisor.errors import ConfigError
from supervisor.host.work import EngineSpec, ModelSpec, Sandbox
from supervisor.secrets import TOKEN, has_secret, judge_file
from supervisor.settings import CoordinatorTable, EngineTable, LimitsTable, ModelTable, Settings
from supervisor.toml_lines import Path as KeyPath

MAX_SOCKET_PATH_BYTES = 100  # 104 on macOS, 108 on Linux, the closing zero included
SEARCH = ("$BULKHEAD_CONFIG", "./worker.toml", "~/.config/bulkhead/worker.toml", "/etc/bulkhead/worker.toml")
MASK = "****"  # shown in the place of a secret
_SECRET = re.compile(r"token|secret|password|passwd|key|credential", re.IGNORECASE)


def find_config(given: str | None, environ: Mapping[str, str] = os.environ) -> Path:
    """Return the configuration file: the given one, else the first that exists of `SEARCH`.

    Raises:
        ConfigError: there is none.
    """
    if given:
        candidates = [given]
    elif "BULKHEAD_CONFIG" in environ:
        candidates = [environ["BULKHEAD_CONFIG"]]
    else:
        candidates = list(SEARCH[1:])
    for candidate in candidates:
        path = Path(candidate).expanduser()
        if path.is_file():
            return path
    raise ConfigError([f"{candidates[0]}: no such file; looked at {', '.join(SEARCH)}; name one with --config"])


@dataclass(frozen=True)
class Loaded:
    """Checked settings, and the sources that they were made of.

    Attributes:
        warnings: sentences, each with its place, about what keeps single models from being served.
    """

    settings: Settings
    layers: Layers
    warnings: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What works and should be mended all the same, warnings included."""
        return (*self.layers.notes, *self.warnings)


def load(path: Path, environ: Mapping[str, str] = os.environ) -> Settings:
    """Read, check and complete the settings of `path`; all paths in the result are absolute.

    Raises:
        ConfigError: with every problem that was found.
    """
    return read(path, environ).settings


def read(path: Path, environ: Mapping[str, str] = os.environ) -> Loaded:
    """Like `load`, with the sources of each value.

    Raises:
        ConfigError: with every problem that was found.
    """
    layers = read_layers(path, environ)
    problems = [(Source("env", ""), text) for text in layers.problems]
    bad: set[KeyPath] = set()

    def placed(at: KeyPath, sentence: str) -> tuple[Source, str]:
        source = layers.blame(at)
        return source, f"{source}: {dotted(at) or '(top)'}: {sentence}"

    def report(at: KeyPath, sentence: str) -> None:
        bad.add(at)
        problems.append(placed(at, sentence))

    settings: Settings = build(layers.raw, Settings, (), report)
    if settings is not BAD:
        settings = _absolute(settings, path.resolve().parent)
        for at, sentence in _crosscheck(settings, environ):
            if not any(known[: len(at)] == at for known in bad):
                report(at, sentence)
    if problems:
        raise ConfigError(_sorted(problems))
    return Loaded(settings, layers, tuple(_sorted([placed(*found) for found in warn_models(settings.models)])))


def _sorted(placed: list[tuple[Source, str]]) -> list[str]:
    """Sentences in the order of their places."""
    return [text for _, text in sorted(placed, key=lambda one: (one[0].rank, one[0].line, one[1]))]


# ---- paths ---------------------------------------------------------------------------------------------------


def _absolute(settings: Settings, folder: Path) -> Settings:
    """Make every path of the settings absolute. Links stay: a venv's python is one, and must not be followed."""

    def absolute(text: Any) -> Any:
        return os.path.join(folder, os.path.expanduser(text)) if isinstance(text, str) and text else text

    def interpreter(text: str) -> Any:
        return absolute(text) if "/" in text or not text else shutil.which(text) or text

    def engine(table: EngineTable) -> EngineTable:
        lists = {name: getattr(table, name) for name in ("read", "write", "execute")}
        paths = {
            name: [absolute(path) for path in paths] if isinstance(paths, list) else paths
            for name, paths in lists.items()
        }
        return msgspec.structs.replace(table, python=interpreter(table.python), **paths)

    def model(table: ModelTable) -> ModelTable:
        files = {role: absolute(path) for role, path in table.files.items()}
        return msgspec.structs.replace(table, path=absolute(table.path), files=files)

    link = settings.coordinator
    results = absolute(link.goliat.results_dir)
    deploy = msgspec.structs.replace(link.deploy, token_file=absolute(link.deploy.token_file))
    goliat = msgspec.structs.replace(link.goliat, results_dir=results)
    link = msgspec.structs.replace(link, goliat=goliat, deploy=deploy)
    return msgspec.structs.replace(
        settings,
        coordinator=msgspec.structs.replace(link, **{name: absolute(getattr(link, name)) for name in _LINK_FILES}),
        worker=msgspec.structs.replace(settings.worker, state_dir=absolute(settings.worker.state_dir)),
        control=msgspec.structs.replace(settings.control, socket=absolute(settings.control.socket)),
        log=msgspec.structs.replace(
            settings.log, **{name: absolute(getattr(settings.log, name)) for name in ("file", "sentry_dsn_file")}
        ),
        otel=msgspec.structs.replace(settings.otel, headers_file=absolute(settings.otel.headers_file)),
        engines={name: table if table is BAD else engine(table) for name, table in settings.engines.items()},
        models=[table if table is BAD else model(table) for table in settings.models],
    )


_LINK_FILES = ("token_file", "enrol_token_file", "tls_cert", "tls_key", "tls_ca")


def state_dir(settings: Settings, environ: Mapping[str, str] = os.environ) -> Path:
    """The folder for what outlives a run: configured, else systemd's, else the XDG place."""
    if settings.worker.state_dir:
        return Path(settings.worker.state_dir)
    if environ.get("STATE_DIRECTORY"):
        return Path(environ["STATE_DIRECTORY"].split(":")[0])
    base = environ.get("XDG_STATE_HOME", "")
    home = Path(base) if os.path.isabs(base) else Path.home() / ".local" / "state"
    return home / "bulkhead"


def control_socket(settings: Settings) -> Path:
    """Where the owner speaks with the supervisor: configured, else in the state folder.

    A socket's path may have about 100 bytes. Below a state folder that lies too deep it is a name made of that
    folder's, in the folder that the system has for such things.
    """
    if settings.control.socket:
        return Path(settings.control.socket)
    folder = state_dir(settings)
    path = folder / "control.sock"
    if len(os.fsencode(path)) <= MAX_SOCKET_PATH_BYTES:
        return path
    digest = hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:16]
    return Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"bulkhead-{os.getuid()}-{digest}.sock"


# ---- checks over several fields --------------------------------------------------------------------------------


def _check_quiet_hours(settings: Settings) -> Iterator[Finding]:
    from supervisor.machine import schedule

    table = settings.holds.schedule
    for number, text in enumerate(table.quiet):
        try:
            schedule.parse(text)
        except ValueError as error:
            yield ("holds", "schedule", "quiet", number), str(error)
    try:
        schedule.zone(table.time_zone)
    except ValueError as error:
        yield ("holds", "schedule", "time_zone"), str(error)


def _crosscheck(settings: Settings, environ: Mapping[str, str]) -> Iterator[Finding]:
    yield from _check_coordinator(settings.coordinator, environ)
    yield from _WAYS[settings.coordinator.dialect].more(settings)
    if settings.worker.name and not is_safe_id(settings.worker.name):
        yield ("worker", "name"), "has characters other than letters, digits and _ . : - (at most 128, no mark first)"
    for name, table in settings.engines.items():
        if table is not BAD:
            yield from _check_engine(name, table)
    yield from _check_quiet_hours(settings)
    yield from check_models(settings.models, settings.engines)


class _Way(NamedTuple):
    """What a dialect wants of `[coordinator]`; the dialects themselves are too much to load for a check."""

    schemes: tuple[str, ...]
    token: bool
    embedded: bool
    more: Callable[[Settings], Iterator[Finding]] = lambda _settings: iter(())


_WAYS = {
    "native": _Way(("ws", "wss"), token=True, embedded=True),
    "studio": _Way(("https", "wss", "http", "ws"), token=False, embedded=False),
    "goliat": _Way(("https", "http"), token=False, embedded=False, more=check_goliat),
}


def _check_coordinator(table: CoordinatorTable, environ: Mapping[str, str]) -> Iterator[Finding]:
    def at(name: str, sentence: str) -> Finding:
        return ("coordinator", name), sentence

    way = _WAYS[table.dialect]
    schemes = " or ".join(f"{scheme}://" for scheme in way.schemes)
    if table.url == "embedded" and not way.embedded:
        yield at("url", f'"embedded" speaks no {table.dialect}: give the {schemes} address of a coordinator that does')
    elif table.url == "embedded":
        yield from (at("listen", sentence) for sentence in _check_listen(table))
        if bool(table.tls_cert) != bool(table.tls_key):
            missing = "tls_key" if table.tls_cert else "tls_cert"
            yield at(missing, "is missing: tls_cert and tls_key go together")
    else:
        if not re.match(rf"({'|'.join(way.schemes)})://[^/\s?#]+[^\s?#]*\Z", table.url):
            either = f'is neither "embedded" nor the {schemes}' if way.embedded else f"is not the {schemes}"
            yield at("url", f'"{table.url}" {either} address of a coordinator')
        elif way.token and not table.token_file and not has_secret(TOKEN, environ):
            yield at(
                "token_file",
                "is missing: a remote coordinator wants this worker's token, from this file, "
                f"from the systemd credential {TOKEN} or from BULKHEAD_TOKEN",
            )
    for name in ("tls_cert", "tls_key", "tls_ca"):
        if (path := getattr(table, name)) and not os.path.isfile(path):
            yield at(name, f"there is no file {path}")
    if table.enrol_token_file and (table.dialect != "native" or table.url == "embedded" or not table.token_file):
        yield at(
            "enrol_token_file", "needs a remote native coordinator, and token_file, which says where the key is put"
        )
    awaited = table.enrol_token_file and not os.path.lexists(table.token_file)
    if table.token_file and not awaited and (sentence := judge_file(Path(table.token_file))):
        yield at("token_file", sentence)


def _check_listen(table: CoordinatorTable) -> Iterator[str]:
    host, separator, port = table.listen.rpartition(":")
    if not separator or not host or not port.isdecimal() or int(port) > 65535:
        yield f'"{table.listen}" is not HOST:PORT with a port from 0 to 65535'
        return
    with contextlib.suppress(ValueError):  # a name: the coordinator judges what it resolves to
        if not ipaddress.ip_address(host.strip("[]")).is_loopback and not (table.tls_cert or table.tls_key):
            yield (
                f"{host} can be reached from other machines, and keys would cross the network in the clear: give "
                "tls_cert and tls_key, or listen on 127.0.0.1, where a proxy of this machine can add TLS"
            )


def _check_engine(name: str, table: EngineTable) -> Iterator[Finding]:
    at = ("engines", name)
    if name not in CATALOG and not table.module:
        hint = did_you_mean(name, CATALOG)
        yield at, f'there is no engine "{name}"{hint}; an engine of your own needs `module`'
    if table.module and not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", table.module):
        yield (*at, "module"), f'"{table.module}" is not the name of a Python module'
    if table.python and not os.access(table.python, os.X_OK):
        yield (*at, "python"), f"there is no program {table.python}"
    if table.device not in ("", "cpu", "cuda", "auto"):
        yield (*at, "device"), f'"{table.device}" is not one of cpu, cuda, auto'
    for path, sentence in check_engine_options(name, table):
        yield (*at, *path), sentence


# ---- what the host needs -----------------------------------------------------------------------------------------


def build_models(settings: Settings) -> list[ModelSpec]:
    """Turn checked settings into what the host loads, with the engine's defaults filled in."""
    limits = settings.limits
    return [_spec(model, settings.engines.get(model.engine, EngineTable()), limits) for model in settings.models]


def sandbox_of(table: EngineTable) -> Sandbox:
    """How the operator confines an engine."""
    return Sandbox(
        mode=table.sandbox,
        network=table.network,
        read=tuple(table.read),
        write=tuple(table.write),
        execute=tuple(table.execute),
    )


def _spec(model: ModelTable, table: EngineTable, limits: LimitsTable) -> ModelSpec:
    entry = CATALOG.get(model.engine)
    default = entry.module if entry is not None else ""
    files = ({"model": model.path} if model.path else {}) | model.files
    return ModelSpec(
        name=model.name,
        engine=EngineSpec(
            name=model.engine,
            module=table.module or default,
            python=table.python or sys.executable,
            env=table.env,
            sandbox=sandbox_of(table),
        ),
        model=Model(
            name=model.name,
            kinds=tuple(model.kinds) or (entry.kinds if entry is not None else ()),
            files=files,
            backend=model.backend,
            device=model.device or table.device or "auto",
            devices=tuple(model.gpus),
            options=table.options | model.options,
        ),
        sha256={role: digest.lower() for role, digest in model.sha256.items()},
        stall_s=model.stall_s or (math.inf if entry is not None and entry.silent else 0.0),
        keep_alive_s=limits.keep_alive_s if model.keep_alive_s is None else model.keep_alive_s,
        memory_bytes=int((model.memory_gb or limits.memory_gb) * 2**30),
        vram_bytes=int(model.vram_gb * 2**30),
        copies=model.copies,
        pin=model.pin,
        group=model.group,
        split=model.split,
    )


def is_secret(name: str) -> bool:
    """Whether a variable of this name looks like one that holds a secret."""
    return bool(_SECRET.search(name))


def masked(settings: Settings) -> dict[str, Any]:
    """The settings as plain values for people, with what looks like a secret blotted out."""
    plain: dict[str, Any] = msgspec.to_builtins(settings)
    plain["models"] = [
        {key: value for key, value in model.items() if value is not None}  # TOML has no null
        for model in plain["models"]
    ]
    for engine in plain["engines"].values():
        engine["env"] = {name: MASK if is_secret(name) else value for name, value in engine["env"].items()}
    return plain
