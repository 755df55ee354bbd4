"""Verbs that order something: pause, resume, drain, shutdown, reload, register, log-level, and those below others."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote, urlencode

from supervisor.control.commands import asking
from supervisor.control.commands.asking import add_verb, as_json, ask, duration, short, tell
from supervisor.control.commands.layout import Paper, count, wrapped
from supervisor.errors import ExitCode, SupervisorError

RELOAD_S = 60.0  # a reload reads the digests of new models
REGISTER_S = 60.0  # it tries the way in
_LEVELS = ("debug", "info", "warning", "error")
# As `supervisor.intake.holds.Source`, which is not loaded for the sake of a command line.
SOURCES = (
    "operator",
    "schedule",
    "presence",
    "battery",
    "thermal",
    "foreign-vram",
    "application",
    "disk",
    "network",
    "engine-failures",
    "coordinator",
    "update",
)
_WHICH = "UUID, its beginning, number or name"
_EXAMPLES = {
    "restart": "  supervisor engines restart chat\n  supervisor engines restart chat --now\n",
    "unload": "  supervisor engines unload chat\n  supervisor engines unload chat --reason 'a game'\n",
    "cordon": "  supervisor gpus cordon 1 --for 2h         by its number\n  supervisor gpus cordon GPU-8f6b --unload\n",
    "uncordon": "  supervisor gpus uncordon 1\n  supervisor gpus uncordon GPU-8f6b\n",
    "put": "  supervisor holds put update --for 30m\n  supervisor holds put disk --mode unload\n",
    "lift": "  supervisor holds lift update\n  supervisor holds lift operator --gpu 1\n",
}


class NoSuch(SupervisorError):
    """What was named is not there, or is there more than once."""

    exit_code = ExitCode.FAILED


def add_arguments(name: str, parser: argparse.ArgumentParser) -> None:
    """Describe the arguments of one verb."""
    asking.add_common(parser)
    if name in ("pause", "resume"):
        parser.add_argument("--kind", metavar="KIND", default="", help="only this task kind: llm, image, audio_stt, …")
        parser.add_argument("--gpu", metavar="GPU", default="", help=f"only this GPU: {_WHICH}")
    if name in ("pause", "log-level"):
        _add_for(parser)
    if name == "pause":
        parser.add_argument("--free-vram", action="store_true", help="also end the models that hold GPU memory")
    if name in ("pause", "drain", "shutdown"):
        _add_reason(parser)
    if name == "drain":
        parser.add_argument("--restart", action="store_true", help="end so that the service manager starts it again")
        parser.add_argument("--wait", action="store_true", help="stay until the supervisor has ended")
    if name == "log-level":
        parser.add_argument("level", choices=_LEVELS)
    if name == "register":
        _add_register(parser)
    parser.set_defaults(command=_COMMANDS[name])


def _add_for(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--for", dest="for_s", metavar="TIME", type=duration, help="how long: 90s, 30m, 2h, 1d, 1h30m")


def _add_reason(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reason", metavar="TEXT", default="", type=short, help="what others are told")


def _add_register(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", help="ws:// or wss:// address of the coordinator")
    parser.add_argument("--token-file", metavar="FILE", default="", help="holds the token; default: it is asked for")
    parser.add_argument("--tls-ca", metavar="FILE", default="", help="PEM file to trust for wss://")
    parser.add_argument("--no-check", dest="check", action="store_false", help="do not try the way in first")


def add_below(name: str, verbs: Any) -> None:
    """Describe the verbs below `engines`, `gpus` or `holds`."""

    def verb(verb: str, help_: str, command: asking.Command) -> argparse.ArgumentParser:
        return add_verb(verbs, verb, help_, command, _EXAMPLES[verb])

    if name == "engines":
        made = verb("restart", "end a model's engine and load it again", _restart)
        made.add_argument("model", metavar="MODEL")
        made.add_argument("--now", action="store_true", help="its jobs go back to the coordinator")
        _add_reason(made)
        made = verb("unload", "end a model's engine after its last job", unload)
        made.add_argument("model", metavar="MODEL")
        _add_reason(made)
    elif name == "gpus":
        made = verb("cordon", "take no jobs on one GPU", _cordon)
        made.add_argument("gpu", metavar="GPU", help=_WHICH)
        made.add_argument("--unload", action="store_true", help="also end the models on it")
        _add_for(made)
        _add_reason(made)
        verb("uncordon", "take jobs on one GPU again", _uncordon).add_argument("gpu", metavar="GPU", help=_WHICH)
    else:
        made = verb("put", "hold jobs back in the name of a source", _put)
        made.add_argument("--mode", choices=("stop", "unload", "abort"), default="stop", help="default: stop accepting")
        _add_scope(made)
        _add_for(made)
        _add_reason(made)
        _add_scope(verb("lift", "take a hold away", _lift))


def _add_scope(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", choices=SOURCES, help=", ".join(SOURCES))
    parser.add_argument("--kind", metavar="KIND", default="", help="only this task kind")
    parser.add_argument("--gpu", metavar="GPU", default="", help="only this GPU")


# ---- which GPU


def which_gpu(word: str, gpus: Sequence[Any]) -> str:
    """The UUID of the GPU that is meant: a UUID or its beginning, a number as `supervisor gpus` counts, or a name.

    Raises:
        NoSuch: none is meant, or several are.
    """
    listed = "; ".join(f"{number}: {gpu['uuid']} {gpu['name']}" for number, gpu in enumerate(gpus)) or "none"
    if word.isascii() and word.isdecimal():
        found = [gpu["uuid"] for gpu in gpus[int(word) : int(word) + 1]]
    else:
        lower = word.lower()
        found = [gpu["uuid"] for gpu in gpus if gpu["uuid"].lower().startswith(lower)]
        found = found or [gpu["uuid"] for gpu in gpus if lower in gpu["name"].lower()]
    if len(found) > 1:
        raise NoSuch(f"{word} may be {', '.join(found)}; name one by its number or more of its UUID ({listed}).")
    if not found:
        raise NoSuch(f"There is no GPU {word}; there is {listed}.")
    return str(found[0])


def _gpu(arguments: argparse.Namespace) -> str:
    """The UUID of the GPU that was named; "" when none was."""
    return which_gpu(arguments.gpu, ask(arguments, "GET", "/v1/gpus")["gpus"]) if arguments.gpu else ""


# ---- holds


def _pause(arguments: argparse.Namespace) -> int:
    order = {"reason": arguments.reason, "free_vram": arguments.free_vram, **_scope(arguments), **_for(arguments)}
    seen = ask(arguments, "POST", "/v1/pause", order)
    what = f"{arguments.kind} jobs".strip() + (f" on GPU {arguments.gpu}" if arguments.gpu else "")
    what = what if arguments.kind or arguments.gpu else ""
    return tell(arguments, seen, lambda seen, paper: _paused(seen, what, arguments.free_vram, paper))


def _scope(arguments: argparse.Namespace) -> dict[str, str]:
    scope = {"kind": arguments.kind, "gpu": _gpu(arguments)}
    return {name: value for name, value in scope.items() if value}


def _for(arguments: argparse.Namespace) -> dict[str, float]:
    return {} if arguments.for_s is None else {"for_s": arguments.for_s}


def _paused(seen: Any, what: str, free_vram: bool, paper: Paper) -> str:
    if what:
        lines = [f"No more {what}; `supervisor resume` with the same options takes them again."]
    else:
        lines = [seen["why"] or "Paused; what runs is finished."]
    if free_vram:
        lines.append("Models that hold GPU memory are ended as soon as they are idle.")
    return _text(lines, paper)


def _resume(arguments: argparse.Namespace) -> int:
    answer = ask(arguments, "POST", "/v1/resume", _scope(arguments))
    return tell(arguments, answer, resumed)


def resumed(answer: Any, paper: Paper) -> str:
    """What became of it, and what still keeps the worker from its jobs."""
    seen = answer["status"]
    lifted = "Resumed." if answer["lifted"] else "It was not paused by the operator."
    if seen["draining"]:
        return _text([lifted, f"It takes no jobs: it is draining ({seen['draining']}), and that is not undone."], paper)
    if answer["lifted"] and seen["state"] == "paused":
        return _text([f"Resumed, but not taking jobs yet: {seen['why']}"], paper)
    return _text([lifted], paper)


def _put(arguments: argparse.Namespace) -> int:
    order = {"source": arguments.source, "mode": arguments.mode, "reason": arguments.reason}
    answer = ask(arguments, "POST", "/v1/holds", {**order, **_scope(arguments), **_for(arguments)})
    return tell(arguments, answer, _held)


def _held(answer: Any, paper: Paper) -> str:
    from supervisor.control import page

    return page.holds([answer["hold"]], answer["status"]["now"], paper)


def _lift(arguments: argparse.Namespace) -> int:
    scope = _scope(arguments)
    answer = ask(arguments, "DELETE", f"/v1/holds/{arguments.source}" + (f"?{urlencode(scope)}" if scope else ""))
    return tell(arguments, answer, lambda answer, paper: _lifted(answer, arguments.source, paper))


def _lifted(answer: Any, source: str, paper: Paper) -> str:
    if not answer["lifted"]:
        return f"There was no such hold of {source}."
    seen = answer["status"]
    left = f" Still not taking jobs: {seen['why']}" if seen["state"] in ("paused", "draining") else ""
    return _text([f"The hold of {source} is lifted.{left}"], paper)


def _cordon(arguments: argparse.Namespace) -> int:
    order = {"reason": arguments.reason, "unload": arguments.unload, **_for(arguments)}
    answer = ask(arguments, "POST", f"/v1/gpus/{quote(_gpu(arguments), safe='')}/cordon", order)
    return tell(arguments, answer, _held)


def _uncordon(arguments: argparse.Namespace) -> int:
    uuid = _gpu(arguments)
    answer = ask(arguments, "POST", f"/v1/gpus/{quote(uuid, safe='')}/uncordon", {})
    return tell(
        arguments,
        answer,
        lambda answer, paper: f"{uuid} takes jobs again." if answer["lifted"] else f"{uuid} was not cordoned.",
    )


# ---- engines and jobs


def _restart(arguments: argparse.Namespace) -> int:
    order = {"reason": arguments.reason, "now": arguments.now}
    answer = ask(arguments, "POST", f"/v1/engines/{quote(arguments.model, safe='')}/restart", order)
    return tell(arguments, answer, _message)


def unload(arguments: argparse.Namespace) -> int:
    """`engines unload`, and `models unload`, which is the same."""
    answer = ask(
        arguments, "POST", f"/v1/engines/{quote(arguments.model, safe='')}/unload", {"reason": arguments.reason}
    )
    return tell(arguments, answer, _message)


def load(arguments: argparse.Namespace) -> int:
    """`models load`."""
    answer = ask(arguments, "POST", f"/v1/models/{quote(arguments.model, safe='')}/load", {})
    return tell(arguments, answer, _message)


def cancel(arguments: argparse.Namespace, job: str) -> int:
    """`jobs cancel`."""
    answer = ask(arguments, "POST", f"/v1/jobs/{quote(job, safe='')}/cancel", {"reason": arguments.reason})
    return tell(arguments, answer, lambda answer, paper: f"{job}: {count(answer['cancelled'], 'attempt')} cancelled.")


def _message(answer: Any, paper: Paper) -> str:
    return _text([answer["message"]], paper)


# ---- the supervisor's life


def _drain(arguments: argparse.Namespace) -> int:
    seen = ask(arguments, "POST", "/v1/drain", {"reason": arguments.reason, "restart": arguments.restart})
    if arguments.wait:
        from supervisor.control.commands import waiting

        return waiting.drained(arguments, seen)
    then = "it is started again" if arguments.restart else "the supervisor ends"
    return tell(
        arguments,
        seen,
        lambda seen, paper: _text([f"Draining: {_jobs(seen['jobs'])}; {then} when that is done."], paper),
    )


def _shutdown(arguments: argparse.Namespace) -> int:
    seen = ask(arguments, "POST", "/v1/shutdown", {"reason": arguments.reason})
    gone = lambda seen, _paper: f"Ending now; {_jobs(seen['jobs'])}, and will be given back."  # noqa: E731
    return tell(arguments, seen, gone)


def _reload(arguments: argparse.Namespace) -> int:
    answer = ask(arguments, "POST", "/v1/reload", {}, patience_s=RELOAD_S)
    tell(arguments, answer, reloaded)
    return int(ExitCode.STOPPED if answer.get("ok", True) else ExitCode.FAILED)


def reloaded(answer: Any, paper: Paper) -> str:
    """What is in force now, what waits for a restart, and what is wrong."""
    lines = [*answer.get("problems", ())]
    lines += [f"Changed: {_change(change)}" for change in answer.get("applied", ())]
    lines += [f"Needs `supervisor drain --restart`: {_change(change)}" for change in answer.get("restart", ())]
    return _text(
        [
            *lines,
            *([] if answer.get("applied") or answer.get("restart") else ["Nothing has changed."]),
            *answer.get("notes", ()),
        ],
        paper,
    )


def _change(change: Any) -> str:
    """One change, as `supervisor.reload_plan.Change.shown` tells it."""
    if not isinstance(change, dict):
        return str(change)
    return f"{change['key']}, from {as_json(change.get('old'))} to {as_json(change.get('new'))}"


def _log_level(arguments: argparse.Namespace) -> int:
    answer = ask(arguments, "POST", "/v1/log-level", {"level": arguments.level, **_for(arguments)})
    until = "until the supervisor ends" if arguments.for_s is None else f"for {arguments.for_s:g} s"
    return tell(arguments, answer, lambda answer, _paper: f"The log says {answer['level']} and worse, {until}.")


def _register(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    order: dict[str, object] = {"url": arguments.url, "check": arguments.check}
    if arguments.token_file:
        order["token_file"] = str(Path(arguments.token_file).expanduser().absolute())
    else:
        order["token"] = _token()
    if arguments.tls_ca:
        order["tls_ca"] = str(Path(arguments.tls_ca).expanduser().absolute())
    answer = ask(arguments, "POST", "/v1/register", order, patience_s=REGISTER_S)
    return tell(arguments, answer, _registered)


def _token() -> str:
    """The token, never on a command line, where every user of the machine could read it."""
    if sys.stdin.isatty():
        import getpass

        token = getpass.getpass("Token of this worker: ")
    else:
        token = sys.stdin.readline()
    if not token.strip():
        raise asking.Usage("No token was given: type it, pipe it in, or name its file with --token-file")
    return token.strip()


def _registered(answer: Any, paper: Paper) -> str:
    return _text([str(answer.get("message", answer))], paper)


def _jobs(number: int) -> str:
    return f"{count(number, 'job')} {'is' if number == 1 else 'are'} running"


def _text(sentences: Sequence[str], paper: Paper) -> str:
    return "\n".join(line for sentence in sentences for line in wrapped(sentence, paper))


_COMMANDS: dict[str, asking.Command] = {
    "pause": _pause,
    "resume": _resume,
    "drain": _drain,
    "shutdown": _shutdown,
    "reload": _reload,
    "register": _register,
    "log-level": _log_level,
}
