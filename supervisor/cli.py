"""The `supervisor` command. Every command imports only what it needs: `version` must not wait for trio.

What each verb does, and its examples, are in verbs.py; its arguments are described by the module that carries it out.
Exit codes: supervisor/errors.py.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from supervisor.errors import ConfigError, ExitCode, SupervisorError
from supervisor.interrupts import INTERRUPTED, is_interrupt
from supervisor.verbs import EXAMPLES, VERBS


class _Parser(argparse.ArgumentParser):
    """argparse with our exit code for a wrong command line, and with a guess at what was meant."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(ExitCode.USAGE, f"{self.prog}: {_guessed(message)}\n")


def _guessed(message: str) -> str:
    """argparse's words about a choice that there is not, with the nearest one that there is."""
    found = re.fullmatch(r"argument (\S+): invalid choice: '(.*?)' \(choose from (.*)\)", message, re.DOTALL)
    if found is None:
        return message
    import difflib

    choices = re.findall(r"'([^']*)'", found[3])
    near = difflib.get_close_matches(found[2], choices, 1)
    what = "command" if found[1] in ("COMMAND", "VERB") else found[1]
    hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(choices)}."
    return f"there is no {what} '{found[2]}'; {hint}"


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
        # A parser costs half a millisecond, and whoever names a verb needs no other one.
        named = [name for name in words[:1] if name in VERBS]
        arguments = _parser(named or list(VERBS), described=named).parse_args(words)
        code = int(arguments.command(arguments))
        sys.stdout.flush()
        return code
    except ConfigError as error:
        for problem in error.problems:
            _complain(problem)
        return int(error.exit_code)
    except SupervisorError as error:
        _complain(f"supervisor: {error}")
        return int(error.exit_code)
    except BrokenPipeError:  # `supervisor config schema | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(ExitCode.FAILED)
    except BaseException as error:
        if not is_interrupt(error):
            raise
        return INTERRUPTED


def _complain(sentence: str) -> None:
    """On stderr, in whole words where it is a terminal."""
    lines = [sentence]
    if sys.stderr.isatty():
        from supervisor.control.commands.layout import paper_of, wrapped

        lines = wrapped(sentence, paper_of(sys.stderr))
    print(*lines, sep="\n", file=sys.stderr)


def every_verb() -> argparse.ArgumentParser:
    """The parser with the arguments of all verbs, for what is made from it: completion."""
    return _parser(list(VERBS), described=list(VERBS))


def _parser(known: Sequence[str], *, described: Sequence[str]) -> argparse.ArgumentParser:
    """A parser of verbs.

    Args:
        known: verbs that it knows.
        described: those of them whose arguments it knows; what knows them is imported.
    """
    parser = _Parser(
        prog="supervisor",
        description="Runs GPU inference jobs in child processes, and ends the ones that misbehave.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, help="print the version and end")
    # With `prog`, argparse need not make a usage line to find it.
    verbs = parser.add_subparsers(required=True, metavar="COMMAND", dest="name", prog="supervisor")
    for name in known:
        verb = VERBS[name]
        made = verbs.add_parser(
            name,
            help=verb.help,
            description=verb.help[:1].upper() + verb.help[1:] + ".",
            epilog=verb.examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name in described:
            _describe(name, made)
    return parser


def _describe(name: str, parser: argparse.ArgumentParser) -> None:
    if name == "run":
        parser.add_argument("--config", metavar="FILE", help="worker.toml")
        parser.set_defaults(command=_run)
    elif name == "version":
        parser.set_defaults(command=_version)
    elif name == "config":
        from supervisor import config_commands

        config_commands.add_arguments(parser, _Parser)
    elif name == "setup":
        from supervisor import setup

        setup.add_arguments(parser)
        parser.set_defaults(command=setup.main)
    elif name == "selftest":
        from supervisor import selftest

        selftest.add_arguments(parser)
        parser.set_defaults(command=selftest.main)
    elif name == "service":
        from supervisor import service_commands

        service_commands.add_arguments(parser)
    elif name == "ui":
        from supervisor.control import ui_command

        ui_command.add_arguments(parser)
        parser.epilog = ui_command.EXAMPLES
    else:
        import importlib

        importlib.import_module(VERBS[name].module).add_arguments(name, parser)


def _run(arguments: argparse.Namespace) -> int:
    from supervisor.config import find_config, load

    path = find_config(arguments.config)
    settings = load(path)
    if settings.coordinator.enrol_token_file:
        from supervisor.enrolment import at_start

        at_start(settings)
    from supervisor.app import run

    return int(run(settings, path))


def _version(_arguments: argparse.Namespace) -> int:
    from supervisor.version import version

    print(f"supervisor {version()}")
    return int(ExitCode.STOPPED)
