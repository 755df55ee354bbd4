"""`supervisor completion bash | zsh | fish`: what the shell offers after TAB, made from the parsers themselves.

The script is whole: pressing TAB starts no Python. It knows verbs, options and the values that an option may have;
names of models and GPUs, which change, it leaves to the person.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from supervisor.errors import ExitCode

SHELLS = ("bash", "zsh", "fish")


class Option(NamedTuple):
    """One option of a verb.

    Attributes:
        names: with their dashes.
        takes: whether a value follows.
        values: those it may have; empty for any.
        file: the value is a file.
    """

    names: tuple[str, ...]
    takes: bool
    values: tuple[str, ...]
    file: bool
    help: str


class Verb(NamedTuple):
    """One verb, with the words that lead to it.

    Attributes:
        words: () for `supervisor` itself, ("gpus", "cordon") for one below another.
        below: verbs that may follow, with their help.
        values: words that may follow.
        files: any file may follow.
    """

    words: tuple[str, ...]
    options: tuple[Option, ...]
    below: tuple[tuple[str, str], ...]
    values: tuple[str, ...]
    files: bool


def verbs_of(parser: argparse.ArgumentParser) -> Any:
    """The action that holds the verbs below a parser; None when it has none."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action
    return None


def walk(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[Verb]:
    """Every verb of a parser, the parser itself first."""
    verbs = verbs_of(parser)
    below = tuple((one.dest, one.help or "") for one in verbs._choices_actions) if verbs is not None else ()
    options: list[Option] = []
    values: list[str] = []
    files = False
    for action in parser._actions:
        named = (str(one) for one in action.choices or ()) if action is not verbs else ()
        if action.option_strings and action.help != argparse.SUPPRESS:
            is_file = action.metavar == "FILE" or action.dest in ("config", "models_dir", "token_file")
            options.append(
                Option(tuple(action.option_strings), action.nargs != 0, tuple(named), is_file, action.help or "")
            )
        elif action is not verbs:
            values += named
            files = files or action.metavar == "FILE" or (action.dest == "source" and not action.choices)
    yield Verb(words, tuple(options), below, tuple(values), files)
    for name, _help in below:
        yield from walk(verbs.choices[name], (*words, name))


# ---- the shells


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """The script for one of `SHELLS`."""
    verbs = list(walk(parser))
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](verbs)


def _quoted(text: str) -> str:
    """As one word of a shell. Not `shlex.quote`, whose way of writing a quote fish does not read inside its own."""
    return "'" + text.replace("\\", "\\\\").replace("'", "") + "'"


def _cases(verbs: list[Verb]) -> Iterator[str]:
    """For each verb: what may follow it, and the values of its options. The words of a verb are one string."""
    for verb in verbs:
        words = [name for name, _ in verb.below] + list(verb.values)
        names = [name for option in verb.options for name in option.names]
        files = " files=1" if verb.files else ""
        yield f"    {_quoted(' '.join(verb.words))}) words={_quoted(' '.join(words))}"
        yield f"      options={_quoted(' '.join(names))}{files}"
        yield '      case "$before" in'
        for option in verb.options:
            if option.takes:
                given = f"values={_quoted(' '.join(option.values))}" if option.values else "values="
                yield f"        {'|'.join(option.names)}) takes=1 {given}{' files=1' if option.file else ''} ;;"
        yield "      esac ;;"


# Both shells: `path` gathers the verbs before the cursor, for the longest that is one.
_WALK = """\
  local word path= next before= words= options= values= takes= files=
  for word in "${line[@]}"; do
    case "$word" in -*) continue ;; esac
    next="${path:+$path }$word"
    case "$next" in
      %s) path="$next" ;;
    esac
  done
"""


def _body(verbs: list[Verb]) -> str:
    known = "|".join(_quoted(" ".join(verb.words)) for verb in verbs if verb.words)
    return _WALK % known + '  before="$previous"\n  case "$path" in\n' + "\n".join(_cases(verbs)) + "\n  esac\n"


def _bash(verbs: list[Verb]) -> str:
    return f"""\
# bash completion of supervisor; put this into ~/.bashrc:  source <(supervisor completion bash)
_supervisor() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}"
  local line=("${{COMP_WORDS[@]:1:COMP_CWORD-1}}")
{_body(verbs)}\
  COMPREPLY=()
  if [ -n "$takes" ]; then
    COMPREPLY=($(compgen -W "$values" -- "$current"))
  elif [[ "$current" == -* ]]; then
    COMPREPLY=($(compgen -W "$options" -- "$current"))
    return
  else
    COMPREPLY=($(compgen -W "$words" -- "$current"))
  fi
  if [ -n "$files" ] && [ ${{#COMPREPLY[@]}} -eq 0 ]; then
    COMPREPLY=($(compgen -f -- "$current"))
    compopt -o filenames 2>/dev/null
  fi
}}
complete -F _supervisor supervisor
"""


def _zsh(verbs: list[Verb]) -> str:
    # `path` is tied to $PATH in zsh, and `words` belongs to its completion.
    body = _body(verbs).replace("path", "verb").replace("words=", "follow=").replace(" words ", " follow ")
    return f"""\
#compdef supervisor
# zsh completion of supervisor; put this into ~/.zshrc:  source <(supervisor completion zsh)
_supervisor() {{
  local current="${{words[CURRENT]}}" previous="${{words[CURRENT-1]}}"
  local -a line
  line=("${{(@)words[2,CURRENT-1]}}")
{body}\
  if [[ -n "$takes" ]]; then
    compadd -- ${{=values}}
  elif [[ "$current" == -* ]]; then
    compadd -- ${{=options}}
    return
  else
    compadd -- ${{=follow}}
  fi
  if [[ -n "$files" ]]; then
    _files
  fi
}}
if [[ "${{funcstack[1]}}" = _supervisor ]]; then
  _supervisor "$@"
else
  compdef _supervisor supervisor
fi
"""


def _fish(verbs: list[Verb]) -> str:
    lines = [
        "# fish completion of supervisor; it belongs into ~/.config/fish/completions/supervisor.fish",
        "function __supervisor_at",
        "    set -l path",
        "    for word in (commandline -opc)[2..-1]",
        "        string match -q -- '-*' $word; and continue",
        "        set -l next (string join ' ' $path $word)",
        f"        contains -- $next {' '.join(_quoted(' '.join(verb.words)) for verb in verbs if verb.words)}",
        "        and set path $path $word",
        "    end",
        '    test "$path" = "$argv"',
        "end",
        "complete -c supervisor -f",
    ]
    for verb in verbs:
        at = f'complete -c supervisor -n "__supervisor_at {" ".join(verb.words)}"'
        lines += [f"{at} -a {_quoted(name)} -d {_quoted(help_)}" for name, help_ in verb.below]
        lines += [f"{at} -a {_quoted(value)}" for value in verb.values]
        lines += [f"{at} -F"] if verb.files else []
        for option in verb.options:
            names = " ".join(f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names)
            takes = (" -r -F" if option.file else " -x") if option.takes else ""
            values = f" -a {_quoted(' '.join(option.values))}" if option.values else ""
            lines.append(f"{at} {names}{takes}{values} -d {_quoted(option.help)}")
    return "\n".join(lines) + "\n"


# ---- the command


def add_arguments(_name: str, parser: argparse.ArgumentParser) -> None:
    """Describe the arguments of `supervisor completion`."""
    parser.add_argument("shell", choices=SHELLS)
    parser.set_defaults(command=main)


def main(arguments: argparse.Namespace) -> int:
    """Print the script; returns the exit code."""
    from supervisor.cli import every_verb

    sys.stdout.write(script(arguments.shell, every_verb()))
    return int(ExitCode.STOPPED)
