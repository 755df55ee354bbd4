"""The `supervisor` command. Every command imports only what it needs: `version` must not wait for trio.

Exit codes: supervisor/errors.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from supervisor.errors import ConfigError, ExitCode, SupervisorError

_CONFIG_HELP = """\
The configuration is worker.toml: --config FILE, else $BULKHEAD_CONFIG, else ./worker.toml, else
~/.config/bulkhead/worker.toml, else /etc/bulkhead/worker.toml. Environment variables are stronger than the file:
BULKHEAD__COORDINATOR__LISTEN=127.0.0.1:9000 sets [coordinator] listen."""

_EXAMPLES = {
    "": """\
examples:
  supervisor run                             serve what ./worker.toml says
  supervisor models pull chat.gguf           add a model to worker.toml
  supervisor config check                    look for mistakes without starting anything
""",
    "run": f"""\
{_CONFIG_HELP}

The first SIGTERM or Ctrl-C drains: running jobs get [limits] drain_s. The second stops at once.

examples:
  supervisor run
  supervisor run --config /etc/bulkhead/worker.toml
  BULKHEAD__LOG__LEVEL=debug supervisor run

exit codes: 0 stopped as asked, 64 wrong command line, 69 the coordinator refused this worker, 70 internal,
73 another process holds this identity, 77 no permission, 78 bad configuration
""",
    "config": "",  # its own, in config_commands.py
    "models": """\
examples:
  supervisor models search chat
  supervisor models pull qwen3-4b            one that is known; or a file, a URL, owner/repo:file
  supervisor models pull ./chat.gguf
  supervisor models pull https://example.org/voice.onnx --sha256 HEX
  supervisor models list
""",
    "setup": """\
examples:
  supervisor setup --dry-run                 print what would be installed
  supervisor setup                           one environment per engine, probed
""",
    "selftest": """\
examples:
  supervisor selftest                        a table: what was tried, what happened, contained or not
  supervisor selftest --json > selftest.json
""",
    "service": """\
examples:
  supervisor service install                 start with this user's login, restart after a crash
  supervisor service install --system        for the whole box, as a user of its own (needs root)
  supervisor service status
  supervisor service uninstall
""",
    "status": """\
examples:
  supervisor status                          what runs, what is loaded, and why a GPU is idle
  supervisor status --json
""",
    "pause": """\
examples:
  supervisor pause                           take no new jobs until `supervisor resume`
  supervisor pause --for 2h                  until then
  supervisor pause --free-vram               end the loaded models, too: the GPU is yours now
""",
    "resume": """\
examples:
  supervisor resume
""",
    "drain": """\
examples:
  supervisor drain                           finish what runs, take nothing new, then end
  supervisor drain --restart                 the same, and be started again by systemd (exit code 75)
""",
    "version": "",
}


_CONTROL = {
    "status": "show what runs, what is loaded, and why a GPU is idle",
    "pause": "take no new jobs for a while",
    "resume": "take jobs again",
    "drain": "finish what runs, then end the supervisor",
}


class _Parser(argparse.ArgumentParser):
    """argparse with our exit code for a wrong command line."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(ExitCode.USAGE, f"{self.prog}: {message}\n")


class _Version(argparse.Action):
    """--version, without reading the version for every other command."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_rest: object) -> NoReturn:
        """Print and leave."""
        parser.exit(_version(argparse.Namespace()))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments = _parser(words).parse_args(words)
        return int(arguments.command(arguments))
    except ConfigError as error:
        print(*error.problems, sep="\n", file=sys.stderr)
        return int(error.exit_code)
    except SupervisorError as error:
        print(f"supervisor: {error}", file=sys.stderr)
        return int(error.exit_code)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `supervisor config schema | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(ExitCode.FAILED)


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="supervisor",
        description="Runs GPU inference jobs in child processes, and ends the ones that misbehave.",
        epilog=_EXAMPLES[""],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, help="print the version and end")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="name")

    def command(name: str, help_: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=help_,
            description=help_[:1].upper() + help_[1:] + ".",
            epilog=_EXAMPLES[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    run = command("run", "serve the configured models until asked to stop")
    run.add_argument("--config", metavar="FILE", help="worker.toml")
    run.set_defaults(command=_run)
    config = command("config", "check, show, change or describe the configuration")
    models = command("models", "search, pull, list, verify, gc and remove models")
    setup = command("setup", "make one environment per engine, for the GPU of this machine")
    selftest = command(
        "selftest", "let a misbehaving engine do its worst on this box, and see whether it was contained"
    )
    service = command("service", "install, remove or look at the service of this user or of the system")
    for name, help_ in _CONTROL.items():
        parser_of_verb = command(name, help_)
        if words[:1] == [name]:
            from supervisor.control import commands as control

            control.add_arguments(name, parser_of_verb)
    # Their arguments are theirs to name; importing both for every command would cost each of them.
    if words[:1] == ["config"]:
        from supervisor import config_commands

        config_commands.add_arguments(config, _Parser)
    if words[:1] == ["models"]:
        from supervisor import pull

        pull.add_arguments(models)
        models.set_defaults(command=pull.main)
    if words[:1] == ["setup"]:
        from supervisor import setup as setting_up

        setting_up.add_arguments(setup)
        setup.set_defaults(command=setting_up.main)
    if words[:1] == ["selftest"]:
        from supervisor import selftest as testing

        testing.add_arguments(selftest)
        selftest.set_defaults(command=testing.main)
    if words[:1] == ["service"]:
        from supervisor import service_commands

        service_commands.add_arguments(service)
    command("version", "print the version").set_defaults(command=_version)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    from supervisor.config import find_config, load

    path = find_config(arguments.config)
    settings = load(path)
    from supervisor.app import run

    return int(run(settings, path))


def _version(_arguments: argparse.Namespace) -> int:
    from supervisor.version import version

    print(f"supervisor {version()}")
    return int(ExitCode.STOPPED)
