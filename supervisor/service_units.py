"""The service as text: a systemd unit (user or system), a launchd job, a Windows scheduled task. Pure.

What a unit says is what was measured under a real systemd (tests/system/test_systemd.py): hardening that takes
layers away from the engines' own sandbox is left out, and the unit says so itself, for whoever would add it.
"""

from __future__ import annotations

import plistlib
from pathlib import PurePath
from xml.sax.saxutils import escape

import msgspec

from supervisor.errors import ExitCode
from supervisor.settings import LimitsTable

MARK = "# Written by `supervisor service install`; `supervisor service uninstall` removes it."
# The endings that need a person first; a restart would only repeat them.
NOT_RESTARTED = (
    ExitCode.USAGE,
    ExitCode.REFUSED,
    ExitCode.IDENTITY_HELD,
    ExitCode.NO_PERMISSION,
    ExitCode.BAD_CONFIG,
    ExitCode.GPU_UNKILLABLE,
)
# The service's own user, made by systemd-sysusers.
SERVICE_USER = "bulkhead"
WATCHDOG_S = 30
# The supervisor says READY when its coordinator answers; a coordinator with a long write-ahead log reads it first.
START_S = 120
# After the drain: the lifelines are cut and SIGKILL has to work (12 s), for the engines and then for the
# coordinator, and a little for a busy box.
_AFTER_DRAIN_S = 2 * 12 + 15


class ServicePlan(msgspec.Struct, frozen=True, kw_only=True):
    """What to run as a service.

    Attributes:
        name: of the unit, without suffix.
        python: absolute path of the interpreter.
        config: absolute path of worker.toml.
        system: for the whole box rather than for one user.
        user: who runs it, for a system unit.
        stop_s: how long a stop may take.
        modprobe: absolute path of nvidia-modprobe, "" when there is none.
    """

    name: str
    python: str
    config: str
    system: bool = False
    user: str = SERVICE_USER
    stop_s: int = 120
    modprobe: str = ""

    @property
    def argv(self) -> tuple[str, ...]:
        """What is started. `-P`: a folder named `protocol` in the working folder must not stand in for ours."""
        return (self.python, "-P", "-m", "supervisor", "run", "--config", self.config)


def stop_s(limits: LimitsTable) -> int:
    """How long a stop may take until the service manager loses patience: the drain and every wait after it."""
    return int(limits.drain_s + limits.cancel_grace_s + 2 * limits.term_grace_s) + _AFTER_DRAIN_S


# ---- systemd ---------------------------------------------------------------------------------------------------


def systemd_unit(plan: ServicePlan) -> str:
    """The text of NAME.service."""
    return "\n".join([MARK, *_unit_section(plan), *_service_section(plan), *_install_section(plan)]) + "\n"


def systemd_words(argv: tuple[str, ...]) -> str:
    """A command line for ExecStart=.

    The leading ":" switches off the substitution of $VARIABLES, which has no way to quote the program's own path;
    % begins a specifier and is doubled; quotes and backslashes are escaped as in C. As the path of a program systemd
    refuses them even so, as an argument it does not: `env` then starts the program.
    """
    if any(char in "\"'\\" or not char.isprintable() for char in argv[0]):
        argv = ("/usr/bin/env", *argv)
    return ":" + " ".join(_systemd_word(word) for word in argv)


def _systemd_word(word: str) -> str:
    plain = word.replace("%", "%%")
    if plain and all(char.isalnum() or char in "/._-+=:,@%" for char in plain):
        return plain
    escaped = plain.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return f'"{escaped}"'


def _unit_section(plan: ServicePlan) -> list[str]:
    lines = ["", "[Unit]", f"Description=Bulkhead worker ({plan.name})"]
    if plan.system:
        lines += ["Wants=network-online.target", "After=network-online.target nvidia-persistenced.service"]
    return [*lines, "# Restarted for ever: RestartSec paces it.", "StartLimitIntervalSec=0"]


def _service_section(plan: ServicePlan) -> list[str]:
    lines = ["", "[Service]", "Type=notify", "NotifyAccess=main"]
    if plan.modprobe and plan.system:
        # Its device nodes exist only after somebody asked for them, and NoNewPrivileges keeps us from asking.
        lines.append(f"ExecStartPre=-+{systemd_words((plan.modprobe, '-u', '-c=0'))}")
    lines += [
        f"ExecStart={systemd_words(plan.argv)}",
        "ExecReload=/bin/kill -HUP $MAINPID",
        f"TimeoutStartSec={START_S}",
        "# The drain ([limits] drain_s) and every wait after it; a longer drain asks for more by itself.",
        f"TimeoutStopSec={plan.stop_s}",
        "# Fed only while the supervisor makes progress; it is aborted and started again when it does not.",
        f"WatchdogSec={WATCHDOG_S}",
        "# SIGTERM to the supervisor alone, which drains; what is left after it gets SIGKILL.",
        "KillMode=mixed",
        "Restart=on-failure",
        "RestartSec=2",
        "# These endings need a person first.",
        f"RestartPreventExitStatus={' '.join(str(int(code)) for code in NOT_RESTARTED)}",
        f"RestartForceExitStatus={int(ExitCode.RESTART)}",
        f"SuccessExitStatus={int(ExitCode.RESTART)}",
        "# An engine that runs out of memory is ended alone.",
        "OOMPolicy=continue",
        "# Each engine gets a control group of its own.",
        "Delegate=yes",
        "LimitCORE=0",
        "LimitNOFILE=65536",
        "UMask=0077",
        "# Left out on purpose. SystemCallFilter ends every engine by SIGSYS and RestrictNamespaces takes their",
        "# namespaces: both are what engines lock themselves down with. ProtectKernelTunables, ProtectKernelLogs and",
        "# ProtectProc cover parts of /proc, and some kernels then refuse engines a /proc of their own. PrivateDevices",
        "# hides the GPU; so do DeviceAllow and ProtectClock when nvidia-uvm is loaded after the start.",
    ]
    return lines + (_system_only(plan) if plan.system else [])


def _system_only(plan: ServicePlan) -> list[str]:
    """What only the system's own manager may do; a user's silently ignores some of it."""
    own = ["RemoveIPC=yes"] if plan.user == SERVICE_USER else []  # else it would take what others of that user share
    return [
        f"User={plan.user}",
        *own,
        f"StateDirectory={plan.name}",
        "StateDirectoryMode=0700",
        f"RuntimeDirectory={plan.name}",
        "RuntimeDirectoryMode=0700",
        "WorkingDirectory=/",
        "LimitMEMLOCK=infinity",
        "NoNewPrivileges=yes",
        "CapabilityBoundingSet=",
        "ProtectSystem=full",
        "# Models may lie in somebody's home; who may read them there is for the file modes to say.",
        "ProtectHome=read-only",
        *_private_tmp(plan),
        "ProtectKernelModules=yes",
        "RestrictSUIDSGID=yes",
        "RestrictRealtime=yes",
        "LockPersonality=yes",
    ]


def _private_tmp(plan: ServicePlan) -> list[str]:
    """Not where the program itself, or its configuration, lies in a folder for temporary files: it would vanish."""
    return [] if any(word.startswith(("/tmp/", "/var/tmp/")) for word in plan.argv) else ["PrivateTmp=yes"]


def _install_section(plan: ServicePlan) -> list[str]:
    return ["", "[Install]", f"WantedBy={'multi-user.target' if plan.system else 'default.target'}"]


def sysusers(user: str) -> str:
    """The text of /etc/sysusers.d/USER.conf: the service's user, in the groups that own GPU devices."""
    return (
        f"{MARK}\n"
        f'u {user} - "Bulkhead worker" /var/lib/{user}\n'
        # A group that is not there yet is made: AMD's and Intel's device nodes belong to it when they come.
        f"m {user} video\n"
        f"m {user} render\n"
    )


# ---- launchd ---------------------------------------------------------------------------------------------------

# launchd restarts on every exit code but 0 and knows no list of exceptions, so the endings that need a person are
# turned into 0. The shell waits for the supervisor and passes SIGTERM on, for launchd signals only the shell.
_LAUNCHD_SHELL = """\
"$@" &
child=$!
trap 'kill -TERM "$child" 2>/dev/null' TERM INT
wait "$child"
code=$?
while kill -0 "$child" 2>/dev/null; do
    wait "$child"
    code=$?
done
case $code in
    {codes}) echo "supervisor: exit code $code needs a person; not restarted" >&2; exit 0 ;;
esac
exit "$code"
"""


def launchd_shell() -> str:
    """The script that stands between launchd and the supervisor; its arguments are what it runs."""
    return _LAUNCHD_SHELL.format(codes="|".join(str(int(code)) for code in NOT_RESTARTED))


def launchd_job(plan: ServicePlan, log: str) -> bytes:
    """The property list of the job.

    Args:
        log: absolute path of the file for stdout and stderr.
    """
    job: dict[str, object] = {
        "Label": plan.name,
        "ProgramArguments": ["/bin/sh", "-c", launchd_shell(), "supervisor", *plan.argv],
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": 10,  # launchd's shortest
        "ExitTimeOut": plan.stop_s,
        # "Background" would throttle the engines' processors and disks.
        "ProcessType": "Interactive",
        "Umask": 0o077,
        "StandardOutPath": log,
        "StandardErrorPath": log,
    }
    if plan.system:
        job["UserName"] = plan.user
    return plistlib.dumps(job)


# ---- Windows ---------------------------------------------------------------------------------------------------

_TASK = """\
<?xml version="1.0" encoding="UTF-16"?>
<Task version="1.2" xmlns="http://schemas.microsoft.com/windows/2004/02/mit/task">
  <RegistrationInfo><Description>Bulkhead worker ({name})</Description></RegistrationInfo>
  <Triggers>{trigger}</Triggers>
  <Principals><Principal id="Author">{principal}</Principal></Principals>
  <Settings>
    <MultipleInstancesPolicy>IgnoreNew</MultipleInstancesPolicy>
    <DisallowStartIfOnBatteries>false</DisallowStartIfOnBatteries>
    <StopIfGoingOnBatteries>false</StopIfGoingOnBatteries>
    <AllowHardTerminate>true</AllowHardTerminate>
    <ExecutionTimeLimit>PT0S</ExecutionTimeLimit>
    <Priority>5</Priority>
    <RestartOnFailure><Interval>PT1M</Interval><Count>999</Count></RestartOnFailure>
  </Settings>
  <Actions Context="Author">
    <Exec><Command>{command}</Command><Arguments>{arguments}</Arguments>\
<WorkingDirectory>{folder}</WorkingDirectory></Exec>
  </Actions>
</Task>
"""


def windows_task(plan: ServicePlan, user: str) -> str:
    """The XML of the scheduled task: at this user's logon, or at boot for a system task.

    Args:
        user: DOMAIN\\NAME of who is asked for at logon.
    """
    if plan.system:
        trigger = "<BootTrigger><Enabled>true</Enabled></BootTrigger>"
        # LocalService: no password to keep, and less than an administrator.
        principal = "<UserId>S-1-5-19</UserId><RunLevel>LeastPrivilege</RunLevel>"
    else:
        trigger = f"<LogonTrigger><Enabled>true</Enabled><UserId>{escape(user)}</UserId></LogonTrigger>"
        principal = (
            f"<UserId>{escape(user)}</UserId><LogonType>InteractiveToken</LogonType><RunLevel>LeastPrivilege</RunLevel>"
        )
    command, *rest = plan.argv
    return _TASK.format(
        name=escape(plan.name),
        trigger=trigger,
        principal=principal,
        command=escape(command),
        arguments=escape(" ".join(windows_word(word) for word in rest)),
        folder=escape(str(PurePath(plan.config).parent)),
    )


def windows_word(word: str) -> str:
    """One argument as the C runtime of Windows reads it: backslashes count only before a quote."""
    if word and not any(char in ' \t\n"' for char in word):
        return word
    out, backslashes = "", 0
    for char in word:
        if char == "\\":
            backslashes += 1
            continue
        out += "\\" * (backslashes * 2 + 1 if char == '"' else backslashes) + char
        backslashes = 0
    tail = "\\" * (backslashes * 2)
    return f'"{out}{tail}"'
