"""The service where there is no systemd: launchd on macOS, the Task Scheduler on Windows."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from supervisor.errors import NoPermission
from supervisor.service_backend import Called, ServiceFailed, ServiceState, call, reason_of, write_unit
from supervisor.service_units import SERVICE_USER, ServicePlan, launchd_job, windows_task

Call = Callable[..., Called]


class Launchd:
    """One launchd job: an agent of this user's session, or a daemon of the box.

    Args:
        run: calls launchctl; for tests.
        root: prefix of the system's folders; for tests.
    """

    def __init__(
        self,
        name: str,
        *,
        system: bool,
        environ: Mapping[str, str] = os.environ,
        run: Call = call,
        root: Path = Path("/"),
    ) -> None:
        self._name, self._system, self._call = name, system, run
        home = Path(environ.get("HOME") or Path.home())
        self.unit = (root if system else home) / f"Library/{'LaunchDaemons' if system else 'LaunchAgents'}/{name}.plist"
        self._log = (root if system else home) / f"Library/Logs/{name}.log"
        # An agent of the graphical session: Metal and the user's presence exist only there.
        self._domain = "system" if system else f"gui/{os.getuid()}"

    @property
    def _target(self) -> str:
        return f"{self._domain}/{self._name}"

    def text(self, plan: ServicePlan) -> str:
        """The property list."""
        return launchd_job(plan, str(self._log)).decode()

    def check(self) -> None:
        """Refuse what cannot work.

        Raises:
            NoPermission: a daemon needs root.
        """
        if self._system and os.geteuid() != 0:
            raise NoPermission("A service of the system needs root: run the same command with sudo.")

    def prepare(self, plan: ServicePlan) -> list[str]:
        """macOS has no short way to make a user, so a daemon runs as one that is there.

        Raises:
            ServiceFailed: none was named.
        """
        if self._system and plan.user == SERVICE_USER:
            raise ServiceFailed("On macOS name the user that runs the service: --run-as USER.")
        return ["sudo", "-n", "-u", plan.user, "--"] if self._system else []

    def install(self, plan: ServicePlan, *, start: bool) -> list[str]:
        """Write the job and load it; RunAtLoad starts it. Without `start` it waits for the next login or boot.

        Raises:
            ServiceFailed: launchd refuses it.
        """
        self._log.parent.mkdir(parents=True, exist_ok=True)
        changed = write_unit(self.unit, launchd_job(plan, str(self._log)), b"supervisor")
        said = [f"{'Wrote' if changed else 'Found'} {self.unit}; its log is {self._log}."]
        self._call("launchctl", "enable", self._target)
        if not start:
            return [*said, f"Start it with: launchctl bootstrap {self._domain} {self.unit}"]
        self._call("launchctl", "bootout", self._target, deadline_s=plan.stop_s + 30.0)  # an older one, if any
        done = self._call("launchctl", "bootstrap", self._domain, str(self.unit))
        if done.code != 0:
            raise ServiceFailed(f"launchd does not load {self.unit}: {done.words()}")
        return [*said, "It is started."]

    def uninstall(self) -> list[str]:
        """Stop and remove the job.

        Raises:
            ServiceFailed: there is none.
        """
        if not self.unit.exists():
            raise ServiceFailed(f"{self._name} is not installed: there is no {self.unit}.")
        self._call("launchctl", "bootout", self._target, deadline_s=8 * 86_400.0)  # waits for the drain
        self.unit.unlink()
        return [f"Stopped and removed {self.unit}. The log {self._log} stays."]

    def state(self) -> ServiceState:
        """What `launchctl print` says."""
        done = self._call("launchctl", "print", self._target)

        def field(name: str) -> str:
            found = re.search(rf"^\s*{re.escape(name)} = (.*)$", done.out, re.MULTILINE)
            return found[1].strip() if found else ""

        state = field("state") if done.code == 0 else "not loaded"
        code = field("last exit code").split(":")[0]
        exit_code = int(code) if re.fullmatch(r"-?\d+", code) else None
        runs = field("runs")
        return ServiceState(
            name=self._name,
            scope="system" if self._system else "user",
            installed=self.unit.exists(),
            enabled=self.unit.exists(),
            active=state == "running",
            state=state,
            pid=int(field("pid") or 0),
            restarts=max(0, int(runs) - 1) if runs.isdecimal() else 0,
            exit_code=exit_code,
            unit=str(self.unit),
            reason="" if state == "running" else reason_of(exit_code),
        )


class TaskScheduler:
    """One scheduled task of Windows: at this user's logon, or at boot.

    A service of session 0 sees neither the desktop's user nor, on many boxes, the GPU; a task in the user's session
    needs no administrator. The state folder keeps the XML that was registered.

    Args:
        run: calls schtasks; for tests.
    """

    def __init__(self, name: str, *, system: bool, environ: Mapping[str, str] = os.environ, run: Call = call) -> None:
        self._name, self._system, self._call = name, system, run
        base = environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
        self.unit = Path(base) / "bulkhead" / f"{name}.task.xml"
        domain, user = environ.get("USERDOMAIN", ""), environ.get("USERNAME", "")
        self._user = f"{domain}\\{user}" if domain else user

    def text(self, plan: ServicePlan) -> str:
        """The task's XML."""
        return windows_task(plan, self._user)

    def check(self) -> None:
        """Nothing can be known before schtasks is asked."""

    def prepare(self, plan: ServicePlan) -> list[str]:
        """Nothing to make."""
        return []

    def install(self, plan: ServicePlan, *, start: bool) -> list[str]:
        """Register the task; start it when asked.

        Raises:
            ServiceFailed: schtasks refuses it.
            NoPermission: a task of the system needs an administrator.
        """
        self.unit.parent.mkdir(parents=True, exist_ok=True)
        # schtasks reads UTF-16 with its byte order mark, as the XML says of itself.
        self.unit.write_bytes(windows_task(plan, self._user).encode("utf-16"))
        self._must("/Create", "/F", "/XML", str(self.unit))
        said = [f"Registered the task {self._name} from {self.unit}."]
        if start:
            self._must("/Run")
            return [*said, "It is started."]
        return [*said, f"Start it with: schtasks /Run /TN {self._name}"]

    def uninstall(self) -> list[str]:
        """End and remove the task.

        Raises:
            ServiceFailed: there is none.
        """
        self._call("schtasks", "/End", "/TN", self._name)
        self._must("/Delete", "/F")
        self.unit.unlink(missing_ok=True)
        return [f"Ended and removed the task {self._name}."]

    def state(self) -> ServiceState:
        """What `schtasks /Query` says; its words are in the language of Windows, so only codes are read."""
        done = self._call("schtasks", "/Query", "/TN", self._name, "/FO", "LIST", "/V")
        codes = [line.rpartition(":")[2].strip() for line in done.out.splitlines()]
        # 267009 = SCHED_S_TASK_RUNNING, in the row "Last Result"; the other codes around it mean that it never ran.
        active = "267009" in codes
        return ServiceState(
            name=self._name,
            scope="system" if self._system else "user",
            installed=done.code == 0,
            enabled=done.code == 0,
            active=active,
            state="running" if active else "not running" if done.code == 0 else "not installed",
            unit=str(self.unit),
        )

    def _must(self, verb: str, *words: str) -> None:
        done = self._call("schtasks", verb, "/TN", self._name, *words)
        if done.code == 0:
            return
        said = done.words()
        if "denied" in said.lower():
            raise NoPermission(f"Windows refuses the task: {said}; run this in an administrator's terminal.")
        raise ServiceFailed(f"schtasks {verb} failed: {said}")
