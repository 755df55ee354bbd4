"""coordinator.toml and the command line, merged: what is given on the command line wins."""

from __future__ import annotations

import argparse
import os
import tomllib
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from coordinator import logs
from coordinator.blobs.opening import BlobsConfig
from coordinator.dispatch_settings import DispatchSettings
from coordinator.replicas.opening import ReplicaTable, in_folder
from coordinator.server import Refusal
from coordinator.studio.claims import Source
from coordinator.traces import OtelConfig

DEFAULT_LISTEN = "127.0.0.1:8080"
LOOPBACK_PROXY = "127.0.0.1"
_Seconds = Annotated[float, Meta(gt=0, le=7 * 86_400)]
_Jobs = Annotated[int, Meta(ge=1, le=10_000_000)]
STORE_VARIABLE = "COORDINATOR_STORE"  # a URL with a password is nothing for a command line


class Privacy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section `[privacy]`.

    Attributes:
        undelivered_s: how long what nobody has fetched is kept after its job has ended.
    """

    undelivered_s: _Seconds = 3600.0


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file's keys; all optional.

    Attributes:
        listen: HOST:PORT; port 0 takes a free one.
        state: folder of everything that outlives a run; "" means the default place.
        store: where jobs live, postgres://… or sqlite:PATH; "" means a SQLite file in the state folder.
        store_pooled: a pooler in transaction mode (PgBouncer) is in between; work of others is then found by the poll.
        tls_cert, tls_key: PEM files; relative paths belong to the file's folder.
        behind_proxy: addresses of proxies that add TLS; their X-Forwarded-* headers are believed.
        drain_s: what running requests get at the end.
        job_s: deadline of jobs that bring none.
        max_queued: jobs of all tenants that may wait; one more is refused. What starts later does not count for a job
            that is due now.
        max_queued_per_tenant: the same of one tenant.
        blobs: where files lie: see `BlobsConfig`.
        privacy: of tenants whose content is not kept.
        replica: how the other coordinators over the same database reach this one.
        log_format, log_level: of the log on standard error.
        access_log: whether every request is told, too.
        otel: where traces go: see `OtelConfig`.
        studio_models: where studio workers get the files of a model, its engine there and its kinds, by model name.
    """

    config_version: int = 1
    listen: str = DEFAULT_LISTEN
    state: str = ""
    store: str = ""
    store_pooled: bool = False
    tls_cert: str = ""
    tls_key: str = ""
    behind_proxy: list[str] = []
    drain_s: _Seconds = 30.0
    job_s: _Seconds = 3600.0
    max_queued: _Jobs = DispatchSettings().max_queued
    max_queued_per_tenant: _Jobs = DispatchSettings().max_queued_per_tenant
    replica: ReplicaTable | None = None
    log_format: logs.Format = "text"
    log_level: logs.Level = "info"
    access_log: bool = False
    otel: OtelConfig = OtelConfig()
    studio_models: dict[str, Source] = {}
    blobs: BlobsConfig = BlobsConfig()
    privacy: Privacy = Privacy()


def load(path: Path | None) -> Config:
    """Read the file. Raises Refusal with the file and the key."""
    if path is None:
        return Config()
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text())
        config = msgspec.convert(values, Config)
    except OSError as error:
        raise Refusal(f"{path}: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise Refusal(f"{path}: {error}.") from None
    if config.config_version != 1:
        raise Refusal(f"{path}: config_version {config.config_version} is unknown; this program reads 1.")
    folder = path.resolve().parent
    paths = {name: str(folder / value) for name in ("state", "tls_cert", "tls_key") if (value := getattr(config, name))}
    blobs = {"credentials": config.blobs.credentials, "url": config.blobs.url}
    places = {name: str(folder / value) for name, value in blobs.items() if value and "://" not in value}
    replica = in_folder(config.replica, folder) if config.replica is not None else None
    return msgspec.structs.replace(
        config, replica=replica, **paths, blobs=msgspec.structs.replace(config.blobs, **places)
    )


def merged(config: Config, arguments: argparse.Namespace) -> Config:
    """Lay the command line over the file."""
    given = {name: value for name, value in vars(arguments).items() if name in Config.__struct_fields__ and value}
    return msgspec.structs.replace(config, **given)


def store_address(config: Config) -> str:
    """Where jobs live: given, or the environment's; "" is a file in the state folder."""
    return config.store or os.environ.get(STORE_VARIABLE, "")


def state_dir(config: Config) -> Path:
    """The state folder: given, systemd's, or the user's."""
    if config.state:
        return Path(config.state)
    if folder := os.environ.get("STATE_DIRECTORY", "").split(":")[0]:
        return Path(folder)
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "bulkhead" / "coordinator"
