"""The service under systemd: a unit of this user's manager, or of the system's."""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping
from pathlib import Path

from supervisor.errors import NoPermission
from supervisor.service_backend import Called, ServiceFailed, ServiceState, call, reason_of, write_unit
from supervisor.service_units import MARK, SERVICE_USER, START_S, ServicePlan, systemd_unit, sysusers

_SHOWN = (
    "LoadState,ActiveState,SubState,UnitFileState,MainPID,NRestarts,Result,ExecMainCode,ExecMainStatus,StatusText,"
    "TimeoutStopUSec"
)
_EXITED = "1"  # ExecMainCode: CLD_EXITED
# `stop` and `restart` wait for the drain, which asks for more time than the unit gives when it needs it.
_STOP_S = 8 * 86_400.0


class Systemd:
    """One unit.

    Args:
        booted: exists where systemd is PID 1.
        root: prefix of the system's folders; for tests.
    """

    def __init__(
        self,
        name: str,
        *,
        system: bool,
        environ: Mapping[str, str] = os.environ,
        booted: Path = Path("/run/systemd/system"),
        root: Path = Path("/"),
    ) -> None:
        self._name, self._system = name, system
        self._environ = environ
        self._booted, self._root = booted, root
        self.unit = self._folder() / f"{name}.service"

    def _folder(self) -> Path:
        if self._system:
            return self._root / "etc/systemd/system"
        base = self._environ.get("XDG_CONFIG_HOME", "")
        home = Path(self._environ.get("HOME") or Path.home())
        return (Path(base) if os.path.isabs(base) else home / ".config") / "systemd/user"

    @property
    def scope(self) -> str:
        """ "system" or "user"."""
        return "system" if self._system else "user"

    # ---- before

    def text(self, plan: ServicePlan) -> str:
        """The unit; for a user of its own that one's entry, too."""
        unit = f"# {self.unit}\n{systemd_unit(plan)}"
        if not self._makes_user(plan):
            return unit
        return f"# {self._sysusers(plan)}\n{sysusers(plan.user)}\n{unit}"

    def check(self) -> None:
        """Refuse what cannot work.

        Raises:
            ServiceFailed: systemd does not run here, or this user's manager does not.
            NoPermission: a system unit needs root.
        """
        if not self._booted.is_dir():
            raise ServiceFailed(
                f"systemd does not run here (there is no {self._booted}): let whatever starts programs on this "
                "machine start `supervisor run`, or print the unit with --dry-run."
            )
        if self._system and os.geteuid() != 0:
            raise NoPermission("A service of the system needs root: run the same command with sudo.")
        if not self._system and not self._manager().exists():
            raise ServiceFailed(
                f"The user {_user()} has no service manager now (there is no {self._manager()}): log in as that user, "
                f"run `loginctl enable-linger {_user()}` as root, or install with --system."
            )

    def _runtime(self) -> Path:
        return Path(self._environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}")

    def _manager(self) -> Path:
        return self._runtime() / "systemd/private"

    def _sysusers(self, plan: ServicePlan) -> Path:
        return self._root / f"etc/sysusers.d/{plan.user}.conf"

    def _makes_user(self, plan: ServicePlan) -> bool:
        return self._system and plan.user == SERVICE_USER

    def prepare(self, plan: ServicePlan) -> list[str]:
        """Make the service's user where it has one of its own; returns what starts a program as that user.

        Raises:
            ServiceFailed: the user is not there, or cannot be made.
        """
        if not self._system:
            return []
        if self._makes_user(plan):
            write_unit(self._sysusers(plan), sysusers(plan.user).encode(), MARK.encode())
            _must(call("systemd-sysusers", str(self._sysusers(plan))), f"The user {plan.user} cannot be made")
        try:
            entry = pwd.getpwnam(plan.user)
        except KeyError:
            raise ServiceFailed(f"There is no user {plan.user}; make one, or leave --run-as out.") from None
        return ["setpriv", f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--init-groups", "--"]

    # ---- doing

    def install(self, plan: ServicePlan, *, start: bool) -> list[str]:
        """Write and enable the unit; start it, or start it again when it runs already.

        Raises:
            ServiceFailed: systemd refuses it, or it does not come up; the sentence has its last words.
        """
        changed = write_unit(self.unit, systemd_unit(plan).encode(), MARK.encode())
        self._must("daemon-reload")
        self._must("enable", self.unit.name)
        said = [f"{'Wrote' if changed else 'Found'} {self.unit}; {self.unit.name} is enabled."]
        if start:
            # Not failed any more, else a unit that a bad configuration stopped would stay so.
            self._ctl("reset-failed", self.unit.name)
            done = self._ctl("restart", self.unit.name, deadline_s=_STOP_S if self.state().active else START_S + 30)
            if done.code != 0:
                raise ServiceFailed(self._why_not(done))
            state = self.state()
            said.append(f"It runs (pid {state.pid}){f': {state.status}' if state.status else ''}.")
        elif self.state().active:
            said.append(f"It still runs with its old settings: {self._hint('restart')}")
        else:
            said.append(f"Start it with: {self._hint('start')}")
        if not self._system and not (self._root / f"var/lib/systemd/linger/{_user()}").exists():
            said.append(
                f"It starts with the login of {_user()} and ends with it. To let it run without: "
                f"loginctl enable-linger {_user()}"
            )
        return said

    def uninstall(self) -> list[str]:
        """Stop (which drains), disable and remove the unit.

        Raises:
            ServiceFailed: there is none of ours.
        """
        if not self.unit.exists():
            raise ServiceFailed(f"{self.unit.name} is not installed: there is no {self.unit}.")
        if MARK not in self.unit.read_text():
            raise ServiceFailed(f"{self.unit} was not written by us; it is left alone.")
        owner = _user_of(self.unit.read_text())
        self._must("disable", "--now", self.unit.name, deadline_s=_STOP_S)
        self.unit.unlink()
        self._must("daemon-reload")
        self._ctl("reset-failed", self.unit.name)
        said = [f"Stopped, disabled and removed {self.unit}."]
        if self._system:
            (self._root / f"etc/sysusers.d/{SERVICE_USER}.conf").unlink(missing_ok=True)
            said.append(f"Its state stays in /var/lib/{self._name}, and the user {owner} stays.")
        return said

    # ---- looking

    def state(self) -> ServiceState:
        """What systemd knows of the unit; without a manager to ask, what the files say."""
        installed = self.unit.exists()
        plain = ServiceState(name=self._name, scope=self.scope, installed=installed, unit=str(self.unit))
        if not self._booted.is_dir() or not (self._system or self._manager().exists()):
            return plain
        done = self._ctl("show", self.unit.name, f"--property={_SHOWN}")
        found = dict(line.split("=", 1) for line in done.out.splitlines() if "=" in line)
        if not found or found.get("LoadState") == "not-found":
            return plain
        active = found.get("ActiveState") == "active"
        exited = found.get("ExecMainCode") == _EXITED
        code = int(found.get("ExecMainStatus") or 0) if exited else None
        return ServiceState(
            name=self._name,
            scope=self.scope,
            installed=installed,
            enabled=found.get("UnitFileState") == "enabled",
            active=active,
            state=f"{found.get('ActiveState')} ({found.get('SubState')})",
            pid=int(found.get("MainPID") or 0),
            restarts=int(found.get("NRestarts") or 0),
            exit_code=code,
            status=found.get("StatusText", ""),
            unit=str(self.unit),
            reason="" if active else reason_of(code) or _result(found.get("Result", "")),
        )

    # ---- small parts

    def _ctl(self, *words: str, deadline_s: float = 60.0) -> Called:
        scope = [] if self._system else ["--user"]
        environ = {**self._environ, "XDG_RUNTIME_DIR": str(self._runtime()), "LC_ALL": "C"}
        return call("systemctl", *scope, *words, deadline_s=deadline_s, env=environ)

    def _must(self, *words: str, deadline_s: float = 60.0) -> None:
        _must(self._ctl(*words, deadline_s=deadline_s), f"systemctl {' '.join(words)} failed")

    def _why_not(self, done: Called) -> str:
        state = self.state()
        which = ["-u"] if self._system else ["--user-unit"]
        lines = call("journalctl", "-q", "-o", "cat", "-n", "8", *which, self.unit.name).out.strip()
        why = state.reason or done.words()
        return f"{self.unit.name} is installed but does not come up. {why}" + (f"\n{lines}" if lines else "")

    def _hint(self, verb: str) -> str:
        return f"systemctl {'' if self._system else '--user '}{verb} {self.unit.name}"


def _must(done: Called, what: str) -> None:
    if done.code != 0:
        raise ServiceFailed(f"{what}: {done.words()}")


def _result(result: str) -> str:
    meanings = {
        "watchdog": "It showed no life and was aborted.",
        "timeout": "It did not start or stop in time.",
        "oom-kill": "It ran out of memory.",
        "signal": "A signal ended it.",
        "core-dump": "A signal ended it.",
    }
    return meanings.get(result, "")


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _user_of(unit: str) -> str:
    return next((line.removeprefix("User=") for line in unit.splitlines() if line.startswith("User=")), "root")
