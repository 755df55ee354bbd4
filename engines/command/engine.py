"""The command engine: one process of an operator's program per job.

The operator's configuration says which program and which of the caller's words it may see; the caller fills
places. Every process that the program leaves behind is ended with the run (engines/lockdown/leash.py).
"""

from __future__ import annotations

import collections
import contextlib
import mimetypes
import os
import platform
import re
import shutil
import stat
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar

import msgspec

from engines.command import template
from engines.runtime.contract import (
    Case,
    Claims,
    Engine,
    Fixture,
    Job,
    LoadProgress,
    Model,
    Outcome,
    Ready,
    refuse,
)
from engines.runtime.options import options_as
from engines.runtime.program import Program, describe, inherited
from protocol.engine_wire import MAX_OUTPUT_FILES
from protocol.faults import CODES, Fault, FaultError
from protocol.work import CommandParams, CommandResult

TAIL_LINES = 40
OUT_OF_MEMORY_CODE = 42
_PLAIN_NAME = re.compile(r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]{0,199}\Z")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Load options.

    Attributes:
        argv: the program and its arguments, with places (see template.py).
        args: argument -> regular expression that its whole text must match.
        env: environment of the program, besides PATH, HOME and what the engine itself was given.
        env_allow: names that callers may set.
        cwd: working folder; "" means the attempt's folder.
        config_name: name of the job config file in the attempt's folder; "" means that there is none.
        exit_codes: exit code -> fault code, besides 42 -> out_of_memory.
        grace_s: SIGTERM to SIGKILL when a job is cancelled.
        slots: jobs at once.
    """

    argv: list[str]
    args: dict[str, str] = {}
    env: dict[str, str] = {}
    env_allow: list[str] = []
    cwd: str = ""
    config_name: str = ""
    exit_codes: dict[str, str] = {}
    grace_s: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 5.0
    slots: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 1


class CommandEngine(Engine):
    """Runs `options.argv` per job; see `Config`."""

    name: ClassVar[str] = "command"
    kinds: ClassVar[tuple[str, ...]] = ("command",)

    @classmethod
    def probe(cls, backend: str) -> Claims:
        """Only the operating system is needed."""
        return Claims(versions={"python": platform.python_version()})

    @classmethod
    def fixture(cls, backend: str) -> Fixture:
        """A program of a few lines, run by our own interpreter."""
        return _fixture()

    def load(self, model: Model, scratch: Path, progress: LoadProgress) -> Ready:
        """Check the configuration; nothing is started yet."""
        self._config = config = _config_of(model)
        self._items = template.parse(config.argv)
        self._places = template.places(self._items)
        self._arg_names = {
            name for name in self._places if name not in template.OWN_PLACES and not name.startswith("input:")
        }
        self._patterns = _patterns(config, self._arg_names)
        self._codes = _exit_codes(config)
        self._programs: dict[int, Program] = {}
        self._lock = threading.Lock()
        if config.cwd and not Path(config.cwd).is_dir():
            raise refuse("load_failed", f"options.cwd: {config.cwd} is not a folder.", "options.cwd")
        if config.config_name and not _PLAIN_NAME.match(config.config_name):
            raise refuse("load_failed", "options.config_name must be a plain file name.", "options.config_name")
        if "config" in self._places and not config.config_name:
            raise refuse("load_failed", "options.argv uses {config}: set options.config_name.", "options.config_name")
        program = str(self._items[0][0])
        if shutil.which(program, path=self._environment({}).get("PATH")) is None:
            raise refuse("load_failed", f"options.argv: there is no program {program!r}.", "options.argv")
        limits = {"args": sorted(self._arg_names), "env": sorted(config.env_allow)}
        return Ready(device="cpu", slots=config.slots, limits=limits)

    def validate(self, kind: str, params: CommandParams) -> None:
        """Every place must be filled, nothing else may be given. Raises FaultError, naming the field."""
        for name in sorted(self._arg_names - set(params.args)):
            raise refuse("invalid_parameter", f"args.{name} is missing.", f"args.{name}")
        for name in sorted(set(params.args) - self._arg_names):
            known = ", ".join(sorted(self._arg_names)) or "none"
            raise refuse(
                "invalid_parameter", f"There is no argument {name!r}; known arguments: {known}.", f"args.{name}"
            )
        for name in sorted(set(params.env) - set(self._config.env_allow)):
            raise refuse("invalid_parameter", f"The operator does not let callers set {name}.", f"env.{name}")
        if params.config is not None and not self._config.config_name:
            raise refuse("invalid_parameter", "This model takes no job config file.", "config")
        if params.config is None and "config" in self._places:
            raise refuse("invalid_parameter", "This model needs a job config file.", "config")
        for name, pattern in self._patterns.items():
            if not pattern.fullmatch(str(params.args[name])):
                raise refuse("invalid_parameter", f"args.{name} does not match {pattern.pattern!r}.", f"args.{name}")
        # Inputs are known only when the job comes; the rest of the rendering can already fail here.
        template.render(self._items, lambda name: params.args.get(name, "x"))

    def run(self, job: Job) -> Outcome:
        """Start the program, pass its lines on as progress, judge its end."""
        program = self._start(job)
        tail: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)
        try:
            for number, line in enumerate(program.lines(), 1):
                tail.append(line)
                job.progress(number, None, "output", line)
        finally:
            with self._lock:
                self._programs.pop(id(job), None)
            program.kill()
            code = program.wait()
        job.check_cancelled()
        if code != 0:
            raise FaultError(self._fault(code, list(tail)))
        skipped = _adopt_outputs(job, self._config.config_name)
        for number, text in enumerate(skipped, 1):
            job.progress(number, len(skipped), "files", text)
        return Outcome(body=CommandResult(exit_code=0, output_tail=[*tail, *skipped]))

    def cancel(self, job: Job) -> None:
        """SIGTERM now, SIGKILL after the grace period."""
        with self._lock:
            program = self._programs.get(id(job))
        if program is not None:
            program.terminate()

    def close(self) -> None:
        """End every program; they would end with this process anyway."""
        with self._lock:
            programs = list(self._programs.values())
        for program in programs:
            program.kill()

    # ---- starting

    def _start(self, job: Job) -> Program:
        params: CommandParams = job.params
        folder = job.folder.absolute()
        config_path = folder / self._config.config_name
        values: dict[str, template.Value] = {**params.args, "folder": str(folder), "config": str(config_path)}
        for name in self._places:
            if name.startswith("input:"):
                values[name] = _input(job, name.removeprefix("input:"))
        argv = template.render(self._items, values.__getitem__)
        if params.config is not None:
            text = params.config if isinstance(params.config, str) else msgspec.json.encode(params.config).decode()
            config_path.write_text(text)
        job.check_cancelled()
        program = Program(
            argv,
            env=self._environment(params.env),
            cwd=Path(self._config.cwd) if self._config.cwd else folder,
            grace_s=self._config.grace_s,
        )
        with self._lock:
            self._programs[id(job)] = program
        if job.cancelled.is_set():  # between the check and the line above nobody could have ended it
            program.terminate()
        return program

    def _environment(self, asked: Mapping[str, str]) -> dict[str, str]:
        return {**inherited(), **self._config.env, **asked}

    def _fault(self, code: int, tail: list[str]) -> Fault:
        sentence = f"The program {describe(code)}."
        if code < 0:
            return Fault("command_failed", sentence, detail={"signal": -code, "stderr_tail": tail})
        known = self._codes.get(code, "command_failed")
        retryable = True if known == "out_of_memory" else None
        return Fault(known, sentence, retryable=retryable, detail={"exit_code": code, "stderr_tail": tail})


# ---- configuration


def _config_of(model: Model) -> Config:
    config = options_as(model, Config)
    for name in [*config.env, *config.env_allow]:
        if not _ENV_NAME.match(name):
            raise refuse("load_failed", f"{name!r} is not a name of an environment variable.", "options.env")
    return config


def _patterns(config: Config, names: set[str]) -> dict[str, re.Pattern[str]]:
    found = {}
    for name, text in config.args.items():
        if name not in names:
            raise refuse("load_failed", f"options.args: options.argv has no place {{{name}}}.", "options.args")
        try:
            found[name] = re.compile(text)
        except re.error as error:
            raise refuse("load_failed", f"options.args.{name}: {error}.", f"options.args.{name}") from None
    return found


def _exit_codes(config: Config) -> dict[int, str]:
    codes = {OUT_OF_MEMORY_CODE: "out_of_memory"}
    for text, fault_code in config.exit_codes.items():
        if not (text.isdecimal() and 1 <= int(text) <= 255):
            raise refuse("load_failed", f"options.exit_codes: {text!r} is not 1 to 255.", "options.exit_codes")
        if fault_code not in CODES:
            known = ", ".join(sorted(CODES))
            raise refuse(
                "load_failed",
                f"options.exit_codes.{text}: no fault {fault_code!r}; known: {known}.",
                "options.exit_codes",
            )
        codes[int(text)] = fault_code
    return codes


def _input(job: Job, name: str) -> str:
    if name not in job.inputs:
        raise refuse("invalid_request", f"The input file {name!r} is missing.", f"inputs.{name}")
    return str(job.inputs[name])


# ---- outputs


def _adopt_outputs(job: Job, config_name: str) -> list[str]:
    """Record the regular files that the program left; say of everything else why it was not returned."""
    skipped = []
    for entry in sorted(os.scandir(job.folder), key=lambda entry: entry.name):
        if entry.name == config_name:
            continue
        if reason := _unfit(entry, len(job.files)):
            skipped.append(f"not returned: {entry.name!r} ({reason})")
        else:
            mime = mimetypes.guess_type(entry.name)[0] or "application/octet-stream"
            with contextlib.suppress(FileNotFoundError):
                job.adopt(entry.name, mime)
    return skipped


def _unfit(entry: os.DirEntry[str], taken: int) -> str:
    mode = entry.stat(follow_symlinks=False).st_mode
    if stat.S_ISLNK(mode):
        return "a symbolic link"
    if stat.S_ISDIR(mode):
        return "a folder"
    if not stat.S_ISREG(mode):
        return "not a regular file"
    if not _PLAIN_NAME.match(entry.name) or not entry.name.isprintable():  # undecodable bytes are not printable
        return "hidden, or an odd name"
    return f"more than {MAX_OUTPUT_FILES} files" if taken >= MAX_OUTPUT_FILES else ""


# ---- fixture

_FIXTURE_PROGRAM = """
import pathlib, sys, time
words, beats, folder = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
for beat in range(beats):
    print("beat", beat, flush=True)
    time.sleep(0.01)
(folder / "answer.txt").write_text(words.upper())
print("done", words)
"""


def _fixture() -> Fixture:
    argv = [sys.executable, "-I", "-c", _FIXTURE_PROGRAM.replace("{", "{{").replace("}", "}}")]
    options = {"argv": [*argv, "{words}", "{beats}", "{folder}"], "grace_s": 1.0, "slots": 2}
    quick = {"args": {"words": "a b; $(c)", "beats": 1}}
    return Fixture(
        model=Model(name="fixture-command", device="cpu", options=options),
        cases=(Case(kind="command", params=quick, check=_check_answer),),
        endless=Case(kind="command", params={"args": {"words": "x", "beats": 100_000}}, check=lambda _body, _files: ""),
        refused=(
            ("command", {"args": {"words": "x"}}),
            ("command", {"args": {"words": "x", "beats": 1, "more": 1}}),
            ("command", {"args": {"words": "--help", "beats": 1}}),
            ("command", {**quick, "env": {"LD_PRELOAD": "x"}}),
            ("command", {**quick, "config": "x"}),
        ),
    )


def _check_answer(body: CommandResult, files: Sequence[Path]) -> str:
    if body.output_tail != ["beat 0", "done a b; $(c)"]:
        return f"printed {body.output_tail}"
    texts = [path.read_text() for path in files]
    return "" if texts == ["A B; $(C)"] else f"left {texts}"


ENGINE = CommandEngine
