"""What a dashboard's assignment is here, from its offer to its end. No I/O and no clock of its own.

Theory of operation. A dashboard knows neither attempts nor declines: what it gave is ours until we say how it ended.
So there is at most one assignment at a time, and this is its life:

    offered      to the side; declined for now: offered again; declined for good: an end
    accepted     its lines and its progress are passed on
    out of memory (exit code 42)  the same assignment is offered as the next attempt, three times at most; the attempt
                 before it leaves the ledger only when the next one is in it, so that a crash in between is told
    ended        `finished` or `fatal_error`, as `Ending`, for the session to tell; then acknowledged here

An end that is said again, by a new session, is the same end. Attempts of an earlier life come as ends only: their
slips are in the notes, and there is no second try for them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping

import msgspec
import trio

from protocol import link_wire as wire
from protocol.engine_wire import OutputFile
from protocol.faults import Fault
from protocol.work import CommandResult
from supervisor.link.dialects import goliat_wire as words
from supervisor.link.dialects.goliat_wire import MEMORY_CODE, Message, Slip
from supervisor.link.ledger import Key
from supervisor.link.session import Side

log = logging.getLogger(__name__)

MEMORY_RETRIES = 3
ASSIGNMENT_ENV, REUPLOAD_ENV = "GOLIAT_ASSIGNMENT_ID", "GOLIAT_REUPLOAD_RESULTS"
_FOR_GOOD = ("unsupported", "too_large", "bad_offer")
_LOG_TYPES = {"warning": "warning", "error": "error", "critical": "fatal"}


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """How an attempt ended. `fault` None: well, with these files."""

    slip: Slip
    fault: Fault | None = None
    files: tuple[OutputFile, ...] = ()

    @property
    def sentence(self) -> str:
        """Why it failed, for people."""
        return "" if self.fault is None else self.fault.message or self.fault.code


class _Work:
    def __init__(self, slip: Slip, config: wire.FileRef) -> None:
        self.slip, self.config = slip, config
        self.accepted = False
        self.again_at = 0.0
        self.seen, self.line = 0, ""  # number and text of the latest line that came
        self.memory_errors = 0
        self.before: Slip | None = None  # the attempt that waits for this one to be in the ledger


class Studies:
    """See the module.

    Args:
        model: of the engine `command`, which runs studies.
        env: names of environment variables that may be passed.
        reupload: what `REUPLOAD_ENV` says.
        tell: passes a message on to the dashboard.
        lost: so many lines never came here.
        clock: seconds, monotonic; `utc` seconds since the epoch.

    Attributes:
        changed: set when there is something new for the session to do; it sets a new one.
    """

    def __init__(
        self,
        model: str,
        *,
        env: Collection[str],
        reupload: bool,
        tell: Callable[[Message], None],
        lost: Callable[[int], None],
        clock: Callable[[], float],
        utc: Callable[[], float],
    ) -> None:
        self._model, self._allowed, self._reupload = model, frozenset(env), reupload
        self._tell, self._lost, self._clock, self._utc = tell, lost, clock, utc
        self.changed = trio.Event()
        self._side: Side | None = None
        self._capabilities = wire.Capabilities()
        self._draining = False
        self._work: _Work | None = None
        self._ends: dict[Key, Ending] = {}
        self._slips: dict[str, Slip] = {}  # of earlier lives
        self._attempts: dict[str, int] = {}

    # ---- sessions

    def begin(self, side: Side, hello: wire.Hello, slips: Mapping[str, Slip]) -> None:
        """The dashboard answers. `slips` is what the notes have."""
        self._side, self._capabilities = side, hello.capabilities
        for held in hello.held:
            self._attempts[held.job] = max(held.attempt, self._attempts.get(held.job, 0))
        known = {held.job for held in hello.held} | {ending.slip.job for ending in self._ends.values()}
        if self._work is not None:
            known.add(self._work.slip.job)
        self._slips = dict(slips)
        for job, slip in slips.items():
            if job not in known and not slip.failed:
                lost = Fault("worker_lost", "The worker ended before the study could begin, and has started again.")
                self._ends[slip.key] = Ending(slip=slip, fault=lost)
        side.opened(self.post)

    def finish(self) -> None:
        """The session is over. What was offered and not accepted was taken back with it."""
        side, self._side = self._side, None
        if side is not None:
            side.closed()

    @property
    def free(self) -> bool:
        """Whether another assignment may be asked for."""
        return self._work is None and not self._ends and self.why_not() == "" and not self._held()

    def _held(self) -> int:
        return 0 if self._side is None else self._side.running

    def why_not(self) -> str:
        """Why no study can be run here now, as a phrase; "" when one can."""
        if self._draining:
            return "the worker is draining"
        if not self._capabilities.accepting:
            return self._capabilities.reason or "the worker takes no jobs"
        if self._offered() is None:
            return f"the model {self._model!r} of coordinator.goliat.model does not run commands here now"
        return ""

    def _offered(self) -> wire.ModelOffer | None:
        models = (each for each in self._capabilities.models if each.name == self._model and "command" in each.kinds)
        return next(models, None)

    # ---- what the session brings

    def next_attempt(self, job: str) -> int:
        """The number of an attempt that was not made in this life."""
        return self._attempts.get(job, 0) + 1

    def take(self, slip: Slip, config: wire.FileRef) -> None:
        """An assignment is ours, and its config is here."""
        self._work = _Work(slip, config)
        self._offer()

    def refuse(self, slip: Slip, sentence: str) -> None:
        """An assignment is ours, but cannot be begun."""
        self._end(Ending(slip=slip, fault=Fault("input_unavailable", sentence)))

    def remind(self) -> None:
        """Offer again what was declined for now, when it is time. Called now and then."""
        work = self._work
        if work is None or work.accepted or self._clock() < work.again_at:
            return
        if self._draining:
            self._give_up(work, Fault("worker_stopping", "The worker is stopping."))
        else:
            self._offer()

    def _offer(self) -> None:
        work, side = self._work, self._side
        if work is None or side is None:
            return
        slip = work.slip
        self._attempts[slip.job] = max(slip.attempt, self._attempts.get(slip.job, 0))
        params = {"env": self._env(slip)}
        offer = wire.Offer(
            kind="command",
            model=self._model,
            params=msgspec.Raw(msgspec.msgpack.encode(params)),
            inputs=(work.config,),
            upload=slip.text(),
        )
        work.again_at = self._clock() + 1.0
        side.heard(offer, *slip.key)

    def _env(self, slip: Slip) -> dict[str, str]:
        """Only names that the operator lets callers set: by our configuration, and by what the loaded model says."""
        every = {ASSIGNMENT_ENV: slip.id, REUPLOAD_ENV: "true" if self._reupload else "false"}
        wanted = {name: value for name, value in every.items() if name in self._allowed}
        offered = self._offered()
        allowed = offered.limits.get("env") if offered is not None else None
        if not isinstance(allowed, list | tuple):
            return wanted
        return {name: value for name, value in wanted.items() if name in allowed}

    # ---- what the side posts

    def post(self, body: wire.Body, job: str = "", attempt: int = 0) -> None:
        """Act on it, or drop what a dashboard has no word for."""
        work = self._work if self._work is not None and self._work.slip.key == (job, attempt) else None
        match body:
            case wire.Accept():
                self._accepted(work)
            case wire.Decline():
                self._declined(work, body)
            case wire.Progress():
                self._progress(work, body)
            case wire.Complete():
                self._completed(job, attempt, body)
            case wire.Fail():
                self._failed(job, attempt, body.fault)
            case wire.Announce():
                self._capabilities = body.capabilities
                if self._work is not None and not self.why_not():  # what it was declined for may be over
                    self._work.again_at = min(self._work.again_at, self._clock() + 1.0)
                self._stir()
            case wire.Draining():
                self._draining = True
                self._stir()
            case wire.LogBatch():
                self._log(body)
            case _:
                pass  # started: its first line says it

    def _accepted(self, work: _Work | None) -> None:
        if work is None:
            return
        work.accepted = True
        if work.before is not None:
            self._acknowledge(work.before, "stored")
            work.before = None
        about = f"attempt {work.slip.attempt} of " if work.slip.attempt > 1 else ""
        self._tell(words.status(f"This worker begins {about}assignment {work.slip.id}.", "info", self._utc()))

    def _declined(self, work: _Work | None, decline: wire.Decline) -> None:
        if work is None or work.accepted:
            return
        if decline.code in _FOR_GOOD:
            self._give_up(work, Fault("unsupported", decline.reason))
            return
        log.info("waits to begin: %s", decline.reason, extra={"job": work.slip.job})
        work.again_at = self._clock() + max(1.0, decline.retry_after_ms / 1000)

    def _progress(self, work: _Work | None, progress: wire.Progress) -> None:
        if work is None:
            return
        if progress.phase == "output":  # numbered from 1: between two, some may have been left out for being too many
            if (missed := progress.n - work.seen - 1) > 0:
                self._lost(missed)
            work.seen, work.line = progress.n, progress.text
        if progress.text:
            self._tell(words.said(progress.text, self._utc()))

    def _catch_up(self, tail: object) -> None:
        """The last lines come with the end as well: tell those that progress has left out."""
        work = self._work
        if work is None or not isinstance(tail, list | tuple):
            return
        lines = [_printable(line) for line in tail if isinstance(line, str)]
        seen = max((number for number, line in enumerate(lines, 1) if line == work.line), default=0)
        for line in lines[seen:]:
            self._tell(words.said(line, self._utc()))

    def _log(self, batch: wire.LogBatch) -> None:
        work = self._work
        if work is None or not work.accepted:
            return
        for line in batch.lines:
            if line.job == work.slip.job:
                log_type = _LOG_TYPES.get(line.level, "verbose")
                self._tell(words.status(line.message, log_type, self._utc()))

    def _completed(self, job: str, attempt: int, complete: wire.Complete) -> None:
        if (job, attempt) in self._ends:
            return
        if self._work is not None and self._work.slip.key == (job, attempt):
            self._catch_up(_tail(complete))
        self._end(Ending(slip=self._slip(job, attempt), files=complete.files))

    def _failed(self, job: str, attempt: int, fault: Fault) -> None:
        key, work = (job, attempt), self._work
        if key in self._ends or (work is not None and work.before is not None and work.before.key == key):
            return
        if work is not None and work.slip.key == key:
            self._catch_up(fault.detail.get("stderr_tail"))
        if work is None or work.slip.key != key or fault.detail.get("exit_code") != MEMORY_CODE:
            self._end(Ending(slip=self._slip(job, attempt), fault=fault))
            return
        work.memory_errors += 1
        self._tell(words.memory(fault.message))
        if work.memory_errors > MEMORY_RETRIES or self._draining:
            tries = f"; it was tried {work.memory_errors} times" if work.memory_errors > 1 else ""
            fault = msgspec.structs.replace(fault, message=f"The study ran out of memory{tries}.")
            self._end(Ending(slip=work.slip, fault=fault))
            return
        log.info("the study ran out of memory and is tried again", extra={"job": job})
        work.before = work.slip
        work.slip = msgspec.structs.replace(work.slip, attempt=attempt + 1)
        work.accepted, work.seen, work.line = False, 0, ""
        self._offer()

    # ---- ends

    def _slip(self, job: str, attempt: int) -> Slip:
        if self._work is not None and self._work.slip.job == job:
            return msgspec.structs.replace(self._work.slip, attempt=attempt)
        known = self._slips.get(job, Slip(id=job))
        return msgspec.structs.replace(known, attempt=attempt, failed=False)

    def _give_up(self, work: _Work, fault: Fault) -> None:
        """It never began, or not again."""
        before = work.before
        self._end(Ending(slip=before or work.slip, fault=fault))

    def _end(self, ending: Ending) -> None:
        self._ends[ending.slip.key] = ending
        if self._work is not None and self._work.slip.job == ending.slip.job:
            self._work = None
        self._stir()

    def _stir(self) -> None:
        self.changed.set()

    def endings(self) -> Iterable[Ending]:
        """Those that the dashboard does not have, the oldest first."""
        return list(self._ends.values())

    def told(self, ending: Ending, *, fenced: bool = False) -> None:
        """The dashboard has it, or wants none of it."""
        self._ends.pop(ending.slip.key, None)
        self._slips.pop(ending.slip.job, None)
        self._acknowledge(ending.slip, "fenced" if fenced else "stored")
        self._stir()

    def _acknowledge(self, slip: Slip, verdict: str) -> None:
        if self._side is not None:
            self._side.heard(wire.Ack(verdict="fenced" if verdict == "fenced" else "stored"), *slip.key)


def _printable(line: str) -> str:
    """As lines come in progress, to compare with them."""
    return "".join(char if char.isprintable() else " " for char in line)


def _tail(complete: wire.Complete) -> list[str]:
    try:
        return msgspec.msgpack.decode(complete.inline or b"", type=CommandResult).output_tail
    except msgspec.MsgspecError:
        return []  # a result too large to come inline
