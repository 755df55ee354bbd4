"""The coordinator as a systemd service: the text of its unit, and the word to systemd that it serves.

The unit gives away everything that a coordinator does not need: it starts no programs, opens no devices and writes to
its state folder alone. Its user exists only while it runs. Files with secrets are handed over by systemd as
credentials, so that they may stay root's, mode 0600; the configuration is one of them, and relative paths in it name
the others.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

import msgspec

MARK = "# Written by `coordinator service install`; `coordinator service uninstall` removes it."
NAME = "bulkhead-coordinator"
CONFIG_CREDENTIAL = "coordinator.toml"
# Usage, another one has this state folder, bad configuration: a person comes first.
NOT_RESTARTED = (64, 73, 78)
_AFTER_DRAIN_S = 15
_LOW_PORTS = 1024


class ServicePlan(msgspec.Struct, frozen=True, kw_only=True):
    """What to run as a service.

    Attributes:
        name: of the unit, without suffix.
        python: absolute path of the interpreter.
        places: where else the program lies: what the interpreter is a link to, its libraries, our own folder.
        config: absolute path of coordinator.toml; "" runs with the defaults.
        credentials: name -> absolute path of further files with secrets: a key of TLS, the replicas' secret.
        drain_s: what running requests get at a stop.
        port: that it listens at; below 1024 it needs a capability.
        environment: an absolute path of a file of variables (COORDINATOR_STORE=…); "" is none.
    """

    python: str
    places: tuple[str, ...] = ()
    name: str = NAME
    config: str = ""
    credentials: dict[str, str] = {}
    drain_s: float = 30.0
    port: int = 8080
    environment: str = ""


def unit(plan: ServicePlan) -> str:
    """The text of NAME.service."""
    places = (plan.python, *plan.places)  # none may vanish from the service's view
    command = [plan.python, "-P", "-m", "coordinator", "serve"]
    command += ["--config", f"%d/{CONFIG_CREDENTIAL}"] if plan.config else []
    given = ({CONFIG_CREDENTIAL: plan.config} if plan.config else {}) | plan.credentials
    lines = [
        MARK,
        "",
        "[Unit]",
        f"Description=Bulkhead coordinator ({plan.name})",
        "Wants=network-online.target",
        "After=network-online.target postgresql.service",
        "# Restarted for ever: RestartSec paces it.",
        "StartLimitIntervalSec=0",
        "",
        "[Service]",
        "Type=notify",
        "NotifyAccess=main",
        f"ExecStart=:{' '.join(_word(word) for word in command)}",
        *(f"LoadCredential={name}:{_escaped(path)}" for name, path in given.items()),
        *([f"EnvironmentFile={_escaped(plan.environment)}"] if plan.environment else []),
        "Restart=on-failure",
        "RestartSec=2",
        f"RestartPreventExitStatus={' '.join(map(str, NOT_RESTARTED))}",
        "# The drain (drain_s) and the last answers after it.",
        f"TimeoutStopSec={int(plan.drain_s) + _AFTER_DRAIN_S}",
        "# Opening a large store, or bringing its schema up to date.",
        "TimeoutStartSec=300",
        "DynamicUser=yes",
        f"StateDirectory={plan.name}",
        "StateDirectoryMode=0700",
        "UMask=0077",
        "# One per worker and per client, and some.",
        "LimitNOFILE=65536",
        "LimitCORE=0",
        *_locked_down(places, plan.port),
        "",
        "[Install]",
        "WantedBy=multi-user.target",
    ]
    return "\n".join(lines) + "\n"


def _locked_down(places: Sequence[str], port: int) -> list[str]:
    """What the service may not do; `places` are those where the program lies."""
    low = "CAP_NET_BIND_SERVICE" if 0 < port < _LOW_PORTS else ""
    return [
        f"CapabilityBoundingSet={low}",
        f"AmbientCapabilities={low}",
        "NoNewPrivileges=yes",
        "ProtectSystem=strict",
        f"ProtectHome={'read-only' if any(map(_in_home, places)) else 'yes'}",
        f"PrivateTmp={'no' if any(map(_temporary, places)) else 'yes'}",
        "PrivateDevices=yes",
        "ProtectClock=yes",
        "ProtectControlGroups=yes",
        "ProtectHostname=yes",
        "ProtectKernelLogs=yes",
        "ProtectKernelModules=yes",
        "ProtectKernelTunables=yes",
        "ProtectProc=invisible",
        "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6",
        "RestrictNamespaces=yes",
        "RestrictRealtime=yes",
        "RestrictSUIDSGID=yes",
        "LockPersonality=yes",
        "SystemCallArchitectures=native",
        "SystemCallFilter=@system-service",
        "SystemCallErrorNumber=EPERM",
    ]


def _escaped(text: str) -> str:
    """A path in a setting: % begins a specifier."""
    return text.replace("%", "%%")


def _word(word: str) -> str:
    """One word of a command line; ":" before the first switches off the substitution of $VARIABLES."""
    plain = word if word.startswith("%d/") else _escaped(word)
    if all(char.isalnum() or char in "/._-+=:,@%" for char in plain):
        return plain
    return '"' + plain.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _in_home(path: str) -> bool:
    return path.startswith(("/home/", "/root/", "/run/user/"))


def _temporary(path: str) -> bool:
    return path.startswith(("/tmp/", "/var/tmp/"))


def unreachable(path: str) -> str:
    """The first folder on the way that other users may not pass, "" when there is none: the service's user is one."""
    for folder in reversed(Path(path).parents):
        try:
            if not folder.stat().st_mode & 0o001:
                return str(folder)
        except OSError:
            return str(folder)
    return ""


def notify(state: str) -> bool:
    """Tell systemd how we are (READY=1, STOPPING=1); False where it did not start us, or does not listen."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as pipe:
        try:
            pipe.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)
        except OSError:
            return False
    return True
