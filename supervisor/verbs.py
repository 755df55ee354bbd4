"""The verbs of the `supervisor` command, in the order in which `--help` shows them. Data, read by every command."""

from __future__ import annotations

from typing import NamedTuple

_COMMANDS = "supervisor.control.commands"
_LOOKING, _ORDERING = f"{_COMMANDS}.looking", f"{_COMMANDS}.ordering"
_FOLLOWING, _CARE = f"{_COMMANDS}.following", f"{_COMMANDS}.care"


class Verb(NamedTuple):
    """One verb.

    Attributes:
        help: what it does, in a line; begins small and has no full stop.
        examples: what stands below its help.
        module: has `add_arguments(name, parser)`; "" for those that cli.py knows how to describe.
    """

    help: str
    examples: str
    module: str = ""


def _examples(*lines: str) -> str:
    """What is said about an example, after two spaces or more, stands in a column as near as the examples allow."""
    pairs = [(command, said.strip()) for command, _, said in (line.partition("  ") for line in lines)]
    column = max((len(command) for command, said in pairs if said), default=0)
    return "\n".join(("examples:", *(f"  {command:<{column}}  {said}".rstrip() for command, said in pairs), ""))


_CONFIG_HELP = """\
The configuration is worker.toml: --config FILE, else $BULKHEAD_CONFIG, else
./worker.toml, else ~/.config/bulkhead/worker.toml, else
/etc/bulkhead/worker.toml. Environment variables are stronger than the file:
BULKHEAD__COORDINATOR__LISTEN=127.0.0.1:9000 sets [coordinator] listen.

The first SIGTERM or Ctrl-C drains: running jobs get [limits] drain_s. The
second stops at once.

"""

EXAMPLES = _examples(
    "supervisor run                             serve what ./worker.toml says",
    "supervisor status                          what runs, and why a GPU is idle",
    "supervisor models pull chat.gguf           add a model to worker.toml",
    "supervisor config check                    look for mistakes without starting anything",
)

VERBS: dict[str, Verb] = {
    "run": Verb(
        "serve the configured models until asked to stop",
        _CONFIG_HELP
        + _examples(
            "supervisor run",
            "supervisor run --config /etc/bulkhead/worker.toml",
            "BULKHEAD__LOG__LEVEL=debug supervisor run",
        )
        + """
exit codes: 0 stopped as asked, 64 wrong command line, 69 the coordinator
refused this worker, 70 internal, 73 another process holds this identity,
77 no permission, 78 bad configuration
""",
    ),
    "status": Verb(
        "show what runs, what is loaded, and why a GPU is idle",
        _examples(
            "supervisor status",
            "supervisor status --watch                  until Ctrl-C",
            "supervisor status --json | jq .why",
        ),
        _LOOKING,
    ),
    "jobs": Verb(
        "show jobs, or cancel one",
        _examples(
            "supervisor jobs                            what waits, what runs, and what ended lately",
            "supervisor jobs --state failed --model chat",
            "supervisor jobs 01J9ZK3M                   every attempt of one job",
            "supervisor jobs cancel 01J9ZK3M",
        ),
        _LOOKING,
    ),
    "engines": Verb(
        "show the engines, restart or unload one",
        _examples(
            "supervisor engines",
            "supervisor engines restart chat",
            "supervisor engines unload chat             its GPU memory is free after its last job",
        ),
        _LOOKING,
    ),
    "gpus": Verb(
        "show the GPUs, or take one out of service for a while",
        _examples(
            "supervisor gpus --watch",
            "supervisor gpus cordon 1 --for 2h --reason 'a new fan'",
            "supervisor gpus uncordon GPU-8f6b",
        ),
        _LOOKING,
    ),
    "holds": Verb(
        "show why no jobs are taken; put or lift a hold",
        _examples(
            "supervisor holds                           which there are, which are coming, which cannot be told",
            "supervisor holds put update --for 30m --reason 'a new driver'",
            "supervisor holds lift update",
        ),
        _LOOKING,
    ),
    "pause": Verb(
        "take no new jobs for a while",
        _examples(
            "supervisor pause                           no new jobs until `resume`",
            "supervisor pause --for 2h                  until then",
            "supervisor pause --free-vram               end the models, too: the GPU is yours",
            "supervisor pause --kind image --gpu 1      only these jobs, only there",
        ),
        _ORDERING,
    ),
    "resume": Verb(
        "take jobs again",
        _examples("supervisor resume", "supervisor resume --kind image --gpu 1"),
        _ORDERING,
    ),
    "drain": Verb(
        "finish what runs, then end the supervisor",
        _examples(
            "supervisor drain                           finish what runs, take nothing new, then end",
            "supervisor drain --wait                    the same, and stay until it has ended",
            "supervisor drain --restart                 be started again by systemd (exit code 75)",
        ),
        _ORDERING,
    ),
    "shutdown": Verb(
        "end the supervisor now; what runs goes back to the coordinator",
        _examples("supervisor shutdown", "supervisor shutdown --reason 'a thunderstorm'"),
        _ORDERING,
    ),
    "logs": Verb(
        "show the log, and follow it",
        _examples(
            "supervisor logs -n 20",
            "supervisor logs -f --level warning         also across a restart of the supervisor",
            "supervisor logs --since 10m --grep vram --json",
        ),
        _FOLLOWING,
    ),
    "events": Verb(
        "follow what changes: models, GPUs, holds, jobs",
        _examples(
            "supervisor events                          from now on",
            "supervisor events --since 0 --json         all that are kept, then further ones",
        ),
        _FOLLOWING,
    ),
    "models": Verb(
        "search, pull, list, verify, gc, remove, load and unload models",
        _examples(
            "supervisor models search chat",
            "supervisor models pull qwen3-4b            a known one; or owner/repo:file",
            "supervisor models pull ./chat.gguf",
            "supervisor models pull https://example.org/voice.onnx --sha256 HEX",
            "supervisor models list",
            "supervisor models load chat                now, instead of with its first job",
        ),
        f"{_COMMANDS}.models",
    ),
    "config": Verb("check, show, change or describe the configuration", ""),  # its own, in config_commands.py
    "reload": Verb(
        "read worker.toml again; say what needs a restart",
        _examples("supervisor reload", "supervisor reload --json"),
        _ORDERING,
    ),
    "log-level": Verb(
        "make the log say more or less",
        _examples(
            "supervisor log-level debug --for 10m",
            "supervisor log-level info                  until the supervisor ends",
        ),
        _ORDERING,
    ),
    "register": Verb(
        "tell this worker which coordinator it works for",
        _examples(
            "supervisor register wss://gpu.example.org --token-file token",
            "pass show bulkhead | supervisor register wss://gpu.example.org",
        ),
        _ORDERING,
    ),
    "enrol": Verb(
        "exchange a one-time token for this worker's own key, and write it down",
        _examples(
            "supervisor enrol https://gpu.example.org  its token is asked for",
            "supervisor enrol https://gpu.example.org bhe_TOKEN",
            "supervisor enrol https://gpu.example.org --token-file token --tls-ca ca.pem",
            "supervisor enrol https://gpu.example.org --ask  wait for an admin",
        ),
        "supervisor.enrolment",
    ),
    "ui": Verb("open the page of this worker in a browser", ""),  # its own, in ui_command.py
    "setup": Verb(
        "make one environment per engine, for the GPU of this machine",
        _examples(
            "supervisor setup --dry-run                 print what would be installed",
            "supervisor setup                           one environment per engine, probed",
        ),
    ),
    "service": Verb(
        "install, remove or look at the service of this user or of the system",
        _examples(
            "supervisor service install                 with this user's login",
            "supervisor service install --system        for the whole box (needs root)",
            "supervisor service status",
            "supervisor service uninstall",
        ),
    ),
    "selftest": Verb(
        "let a misbehaving engine do its worst on this box, and see whether it was contained",
        _examples(
            "supervisor selftest                        a table: what was tried, what happened, contained or not",
            "supervisor selftest --json > selftest.json",
        ),
    ),
    "doctor": Verb(
        "look for what keeps this machine from working well",
        _examples(
            "supervisor doctor                          what is wrong, and what mends it",
            "supervisor doctor --json                   exit code 1 when something failed",
        ),
        _CARE,
    ),
    "diagnostics": Verb(
        "gather a bundle for whoever is asked for help",
        _examples(
            "supervisor diagnostics                     bulkhead-diagnostics-DATE.tar.gz",
            "supervisor diagnostics -o /tmp/help.tar.gz",
        ),
        _CARE,
    ),
    "completion": Verb(
        "print what a shell needs to complete command lines",
        _examples(
            "source <(supervisor completion bash)",
            "supervisor completion fish > ~/.config/fish/completions/supervisor.fish",
        ),
        "supervisor.completion",
    ),
    "version": Verb("print the version", _examples("supervisor version", "supervisor --version")),
}
