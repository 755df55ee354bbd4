"""`supervisor service install | uninstall | status`: let the machine's service manager keep the supervisor running.

Before anything is written the configuration is checked twice: here, so that mistakes are told at once, and by the
service's own interpreter, user and environment, because that is what will have to read it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from supervisor.config import ENV_PREFIX, find_config, load
from supervisor.errors import ConfigError, ExitCode, NoPermission
from supervisor.interrupts import ended
from supervisor.service_backend import Backend, ServiceFailed, ServiceState, rehearse
from supervisor.service_units import SERVICE_USER, ServicePlan, stop_s

NAME = "bulkhead"
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z")
SYSTEM_CONFIG = Path("/etc/bulkhead/worker.toml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verbs of `supervisor service` to `parser`."""
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, help_: str, function: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=help_, description=f"{help_[:1].upper()}{help_[1:]}.")
        made.add_argument("--system", action="store_true", help="for the whole box instead of this user (needs root)")
        made.add_argument("--name", default=NAME, help=f"of the service, when there are several; default: {NAME}")
        made.set_defaults(
            command=lambda arguments: ended(lambda: function(arguments), "stopped; `supervisor service status` tells")
        )
        return made

    install = verb("install", "write the service, enable it and start it", _install)
    install.add_argument("--config", metavar="FILE", help="worker.toml")
    install.add_argument(
        "--run-as", metavar="USER", default="", help=f"who runs it, with --system; default: a user {SERVICE_USER}"
    )
    when = install.add_mutually_exclusive_group()
    when.add_argument("--now", dest="start", action="store_true", default=True, help="start it now (the default)")
    when.add_argument(
        "--no-start", dest="start", action="store_false", help="leave the start to the next login or boot"
    )
    install.add_argument("--dry-run", action="store_true", help="print what would be written and change nothing")
    verb("uninstall", "stop the service (running jobs are finished first) and remove it", _uninstall)
    status = verb("status", "show what the service manager knows", _status)
    status.add_argument("--json", action="store_true", help="for programs")


def backend(name: str, *, system: bool) -> Backend:
    """The service manager of this machine.

    Raises:
        ServiceFailed: the name cannot be that of a service, or there is no service manager that we know.
    """
    if not _SAFE_NAME.match(name):
        raise ServiceFailed(f"--name: {name!r} has characters other than letters, digits and _ . - (at most 64).")
    if sys.platform == "darwin":
        from supervisor.service_others import Launchd

        return Launchd(name, system=system)
    if sys.platform == "win32":
        from supervisor.service_others import TaskScheduler

        return TaskScheduler(name, system=system)
    from supervisor.service_systemd import Systemd

    return Systemd(name, system=system)


# ---- install -----------------------------------------------------------------------------------------------------


def _install(arguments: argparse.Namespace) -> int:
    if arguments.run_as and not arguments.system:
        raise ServiceFailed("--run-as goes with --system: a service of a user runs as that user.")
    path = _config(arguments.config, system=arguments.system)
    # The service does not have this shell's variables, so they must not hide a mistake.
    settings = load(path, {})
    plan = ServicePlan(
        name=arguments.name,
        python=sys.executable,
        config=str(path),
        system=arguments.system,
        user=arguments.run_as or SERVICE_USER,
        stop_s=stop_s(settings.limits),
        modprobe=shutil.which("nvidia-modprobe") or "",
    )
    manager = backend(arguments.name, system=arguments.system)
    if arguments.dry_run:
        sys.stdout.write(manager.text(plan))
        return int(ExitCode.STOPPED)
    manager.check()
    _rehearse(plan, manager.prepare(plan))
    said = manager.install(plan, start=arguments.start)
    if left := sorted(name for name in os.environ if name.startswith(ENV_PREFIX)):
        said.append(f"The service does not see {', '.join(left)} of this shell; write such settings into {path}.")
    sys.stdout.write("\n".join(said) + "\n")
    return int(ExitCode.STOPPED)


def _config(given: str | None, *, system: bool) -> Path:
    """The absolute path of worker.toml; links stay, so that they can be turned later."""
    if system and not given and SYSTEM_CONFIG.is_file():
        return SYSTEM_CONFIG
    return Path(os.path.abspath(find_config(given)))


def _rehearse(plan: ServicePlan, prefix: list[str]) -> None:
    """Let the service's user read everything once, with its own eyes.

    Raises:
        ConfigError: it finds mistakes in the configuration: another user may read less.
        NoPermission: it cannot even start, mostly because the interpreter lies in somebody's closed home.
    """
    done = rehearse(plan, prefix, bare(os.environ))
    if done.code == ExitCode.BAD_CONFIG:
        who = [f"For the user {plan.user}:"] if plan.system else []
        raise ConfigError([*who, *done.err.splitlines()])
    if done.code != 0:
        who_ = f"The user {plan.user}" if plan.system else "A service"
        cure = (
            "install Bulkhead in a folder that this user can read (/opt/bulkhead, say), or name another with --run-as"
            if plan.system
            else "install Bulkhead into the environment of this interpreter"
        )
        raise NoPermission(f"{who_} cannot run {plan.python} -m supervisor: {done.words()}; {cure}.")


def bare(environ: Mapping[str, str]) -> dict[str, str]:
    """What a service sees of an environment: nothing that would change our settings or Python's."""
    kept = (
        "PATH",
        "HOME",
        "USER",
        "LOGNAME",
        "LANG",
        "XDG_STATE_HOME",
        "XDG_RUNTIME_DIR",
        "SYSTEMROOT",
        "LOCALAPPDATA",
    )
    return {name: value for name, value in environ.items() if name in kept}


# ---- uninstall and status ----------------------------------------------------------------------------------------


def _uninstall(arguments: argparse.Namespace) -> int:
    manager = backend(arguments.name, system=arguments.system)
    if not arguments.system and not manager.state().installed:
        other = backend(arguments.name, system=True).state()
        if other.installed:
            raise ServiceFailed(f"{arguments.name} is not installed for this user but for the system: add --system.")
    manager.check()
    sys.stdout.write("\n".join(manager.uninstall()) + "\n")
    return int(ExitCode.STOPPED)


def _status(arguments: argparse.Namespace) -> int:
    state = backend(arguments.name, system=arguments.system).state()
    if not arguments.system and not state.installed:
        other = backend(arguments.name, system=True).state()
        state = other if other.installed else state
    if arguments.json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(state)).decode() + "\n")
    else:
        sys.stdout.write(render(state) + "\n")
    return int(ExitCode.STOPPED if state.active else ExitCode.NOT_RUNNING)


def render(state: ServiceState) -> str:
    """A state for people, a few lines."""
    if not state.installed:
        return f"{state.name} is not installed as a service of this {state.scope}; see: supervisor service install"
    lines = [f"{state.name} ({state.scope}): {state.state or 'its manager does not run'}"]
    if state.reason:
        lines.append(state.reason)
    if state.status and state.active:
        lines.append(state.status)
    if state.pid:
        lines.append(f"pid {state.pid}, {state.restarts} restarts")
    if not state.enabled:
        lines.append("not enabled: it will not start by itself")
    return "\n".join([*lines, state.unit])
