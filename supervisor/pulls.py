"""Pulls and removals of models that the owner asks of a running supervisor.

Theory of operation. Each is the command `supervisor models …` in a child, for this supervisor's worker.toml: its locks,
its checks and its sentences are those of the command line, and a file that hangs its parser hangs nobody here. A pull
belongs to the supervisor and not to whoever asked: it goes on when the client leaves, whoever asks for the same again
follows the one under way, and it ends with the supervisor (what was fetched is resumed by the next one). What a pull
has said is kept short, so that somebody who comes late sees the plan, the notes and how far it is. A pull that
succeeded is remembered for `KEPT_S`: a client that lost its connection at the very end asks again, and is told the end
instead of "there is such a model already". One that failed is tried anew, and so is one whose model was removed since.

All methods belong to the trio thread.
"""

from __future__ import annotations

import collections
import logging
import operator
import sys
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import trio

from supervisor.control.asked import Pull, Remove
from supervisor.control.exchange import KEEP_ALIVE_S, Refused
from supervisor.errors import ExitCode
from supervisor.host.child import ChildSpec, open_child, run_child
from supervisor.host.means import OpenChild
from supervisor.model_places import models_dir
from supervisor.model_store import Store
from supervisor.observe.redact import redacted
from supervisor.pull_source import folder_name

log = logging.getLogger(__name__)

MOST = 8  # at once: each is a process with connections of its own
KEPT_S = 60.0
KEPT = 200  # events of a pull besides its progress: its plan, and notes on retries
REMOVE_S = 60.0  # deleting a model's files on a slow disk
MAX_LINE_BYTES = 2**20
TERM_GRACE_S = 2.0
_LAST = ("done", "failed")


class _Course:
    """One pull, as those who follow it see it. Of progress only the latest counts; everything else is kept in order."""

    def __init__(self) -> None:
        self.end: Mapping[str, Any] | None = None
        self.scope, self.over = trio.CancelScope(), trio.Event()
        self._count = 0  # events so far
        self._kept: collections.deque[tuple[int, Mapping[str, Any]]] = collections.deque(maxlen=KEPT)
        self._progress: tuple[int, Mapping[str, Any]] | None = None
        self._news = trio.Event()

    @property
    def failed(self) -> bool:
        return self.end is not None and self.end["t"] == "failed"

    def add(self, said: Mapping[str, Any]) -> None:
        self._count += 1
        if said["t"] == "progress":
            self._progress = (self._count, said)
        elif said["t"] in _LAST:
            self.end = said
        else:
            self._kept.append((self._count, said))
        self._news.set()
        self._news = trio.Event()

    async def follow(self) -> AsyncGenerator[Mapping[str, Any] | None, None]:
        """See `Pulls.pull`."""
        seen = 0
        while True:
            end, count = self.end, self._count
            latest = (*self._kept, *((self._progress,) if self._progress else ()))
            for _number, said in sorted((one for one in latest if one[0] > seen), key=operator.itemgetter(0)):
                yield said
            seen = count
            if end is not None:
                yield end
                return
            if self._count == seen:
                with trio.move_on_after(KEEP_ALIVE_S) as quiet:
                    await self._news.wait()
                if quiet.cancelled_caught:
                    yield None


class Pulls:
    """See the module.

    Args:
        config: worker.toml.
        nursery: pulls live in it, and end with it.
        spawn: `open_child`, or one that writes its children down for the next life.
    """

    def __init__(self, config: Path, nursery: trio.Nursery, spawn: OpenChild = open_child) -> None:
        self._config, self._nursery, self._spawn = config, nursery, spawn
        self._courses: dict[Pull, _Course] = {}

    def pull(self, order: Pull) -> AsyncGenerator[Mapping[str, Any] | None, None]:
        """Begin a pull, or follow the one under way.

        Raises:
            Refused: too many are under way, or another one under this name is.
        """
        course = self._courses.get(order)
        if course is None or course.failed:
            running = [other for other, each in self._courses.items() if each.end is None]
            if other := next((other for other in running if order.name and other.name == order.name), None):
                raise Refused(409, f"{order.name!r} is being pulled from {_shown(other)} already; wait for its end.")
            if len(running) >= MOST:
                raise Refused(429, f"{MOST} pulls are under way; wait for one of them.")
            course = self._courses[order] = _Course()
            self._nursery.start_soon(self._run, order, course)
        return course.follow()

    def under_way(self, order: Pull) -> bool:
        """Whether this very pull is not over."""
        course = self._courses.get(order)
        return course is not None and course.end is None

    def running(self) -> int:
        """How many are under way."""
        return sum(course.end is None for course in self._courses.values())

    async def call_off(self, order: Pull) -> None:
        """End this very pull, if it is under way; returns when it is over. What was fetched stays for another one."""
        course = self._courses.get(order)
        if course is not None and course.end is None:
            course.scope.cancel()
            await course.over.wait()

    async def has_files(self, name: str) -> bool:
        """Whether the models folder has something of this name: a model, or what a pull left."""

        def look() -> bool:
            store, key = Store(models_dir(None, self._config)), folder_name(name)
            return store.folder(key).exists() or store.staging(key).exists()

        return await trio.to_thread.run_sync(look)

    async def _run(self, order: Pull, course: _Course) -> None:
        try:
            with course.scope:
                await self._child(order, course)
            if course.scope.cancelled_caught:
                course.add({"t": "failed", "message": "It was called off; ask again to go on where it stopped."})
        except (OSError, ValueError) as error:  # ValueError: a word that no process can have
            course.add({"t": "failed", "message": f"The pull cannot be started: {error}."})
        except Exception:  # the supervisor would end of it
            log.exception("a pull failed")
            course.add({"t": "failed", "message": "A mistake of ours; the supervisor's log has it."})
        finally:
            if course.end is None:
                course.add({"t": "failed", "message": "The supervisor ends; ask again to go on where it stopped."})
            course.over.set()
            if course.failed:
                self._forget(order, course)
        await trio.sleep(KEPT_S)
        self._forget(order, course)

    def _forget(self, order: Pull, course: _Course) -> None:
        if self._courses.get(order) is course:  # else it was asked for anew meanwhile
            del self._courses[order]

    async def _child(self, order: Pull, course: _Course) -> None:
        spec = ChildSpec(name="models pull", argv=(*_command("pull", self._config), "--json", *_words(order)))
        rest = b""
        async with self._spawn(spec, term_grace_s=TERM_GRACE_S) as child:
            child.close_stdin()
            while data := await child.read():
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    _take(line, course)
                if len(rest) > MAX_LINE_BYTES:
                    child.kill("it does not speak in lines")
                    break
            how = await child.wait()
        if course.end is None:
            words = " | ".join(child.stderr_tail(3)) or how.describe()
            course.add({"t": "failed", "message": f"The pull {how.describe()}: {words}; ask again to go on."})

    async def remove(self, order: Remove) -> str:
        """Take a model out of worker.toml, and its files away; one sentence. The next pull of it looks for itself.

        Raises:
            Refused: it cannot be done, with the command's own words.
        """
        try:
            return await self._removed(order)
        finally:  # whatever came of it: the entry may be gone where the files are not
            for pull, course in list(self._courses.items()):
                if course.end is not None and order.name in (pull.name, course.end.get("name")):
                    self._forget(pull, course)

    async def _removed(self, order: Remove) -> str:
        words = ("--keep-files",) if order.keep_files else ()
        argv = (*_command("remove", self._config), *words, "--", order.name)
        try:
            said, how, child = await run_child(ChildSpec(name="models remove", argv=argv), deadline_s=REMOVE_S)
        except (OSError, ValueError) as error:
            raise Refused(409, f"The removal cannot be started: {error}.") from None
        if how.code == ExitCode.STOPPED:
            return said.decode(errors="replace").strip()
        words_ = " ".join(child.stderr_tail(3)).strip() or how.describe()
        raise Refused(409 if how.code is not None else 500, words_)


def _command(verb: str, config: Path) -> tuple[str, ...]:
    return (sys.executable, "-m", "supervisor", "models", verb, "--config", str(config))


def _words(order: Pull) -> list[str]:
    """The order as arguments. What begins with a dash must not become an option: values are bound by `=`."""
    named = {
        "--name": order.name,
        "--engine": order.engine,
        "--file": order.file,
        "--sha256": order.sha256,
        "--token-file": order.token_file,
        "--options": order.options,
        "--max-gb": f"{order.max_gb:.9f}" if order.max_gb else "",
    }
    words = [f"{option}={value}" for option, value in named.items() if value]
    words += [option for option, wanted in (("--offline", order.offline), ("--force", order.force)) if wanted]
    return [*words, "--", order.source]


def _take(line: bytes, course: _Course) -> None:
    try:
        said = msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return  # a library's own words
    if said.get("t") in ("plan", "progress", "note", *_LAST) and course.end is None:
        course.add(said)


def _shown(order: Pull) -> str:
    """The source without what may be a secret in it."""
    return redacted(order.source)[:200]
