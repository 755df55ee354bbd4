"""The misbehaviour kit as data: what `supervisor selftest` lets an engine do, and what must come of it.

The words are those of engines/synthetic/misbehave.py, which the supervisor never imports; a test compares both. In a
prompt, `{victim}` is our own pid, `{secret}` and `{secret_size}` a file of the user's that no engine was granted,
`{neighbour}` a file in another engine's folder, `{sockets}` addresses of listeners of ours, and `{strays}` paths where
nothing may be left.
"""

from __future__ import annotations

import msgspec

from supervisor.settings import LimitsTable, RecycleTable, RestartTable

STALL_S = 1.0  # the longest silence of a run
GRACE_S = 0.3  # for a cancel, and from SIGTERM to the next step
START_S = 20.0
SHORT_START_S = 4.0  # where a start that never ends is the misdeed
QUARANTINE_AFTER = 3  # bad ends in a row
REPROBE_S = 1.5
# Answers and typed faults come within milliseconds on an idle box; the rest is for a busy one.
SOON_S = 4.0
DISK_S = 15.0  # a folder is measured every few seconds
HANG_S = STALL_S + GRACE_S + SOON_S

CRASHED = ("engine_crashed",)
HUNG = ("engine_hung",)
BROKEN = ("engine_protocol",)


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One misdeed.

    Attributes:
        name: stable; `--case` and other programs use it.
        title: what the engine does, for people.
        expected: what must come of it, for people.
        prompt, load, start: the misdeed, in a run, at the load, or before the greeting.
        answer: the right answer; None when there must be a fault; "" when any answer will do.
        codes: faults that are right.
        within_s: the caller must have the answer or the fault by then.
        deadline_s: of the run.
        cancel_after_s: the caller hangs up so long after the start.
        last_code: the fault of the last of several runs.
        ends: the instance must be gone afterwards, with all its processes.
        runs, pause_s: how often the misdeed is asked, and how long after each other; each must come out right.
        spawns: makes processes, which are counted while it runs.
        beside: a second run is in flight in the same instance, and has to get the same fault.
        recycled: the instance has to be replaced between two of the runs.
        managed: attempts of an attack that are harmless where the engine has a network of its own.
        start_s, memory_mib, scratch_mib, growth_mib: limits, where the case is about them.
        linux: needs what only Linux has.
    """

    name: str
    title: str
    expected: str
    group: str = ""
    prompt: str = ""
    load: str = ""
    start: str = ""
    answer: str | None = None
    codes: tuple[str, ...] = ()
    within_s: float = SOON_S
    deadline_s: float = 20.0
    cancel_after_s: float | None = None
    last_code: str = ""
    ends: bool = False
    runs: int = 1
    pause_s: float = 0.0
    spawns: bool = False
    beside: bool = False
    recycled: bool = False
    managed: tuple[str, ...] = ()
    start_s: float = START_S
    memory_mib: int = 0
    scratch_mib: int = 0
    growth_mib: int = 0
    linux: bool = False

    @property
    def attacks(self) -> bool:
        """Whether the answer tells what the engine managed, and must name nothing."""
        return self.group == "attacks" and self.answer == ""

    @property
    def limits(self) -> LimitsTable:
        """Short limits, so that the whole kit is done in minutes."""
        return LimitsTable(
            start_s=self.start_s,
            load_s=STALL_S,
            first_output_s=STALL_S,
            stall_s=STALL_S,
            cancel_grace_s=GRACE_S,
            term_grace_s=GRACE_S,
            job_s=60.0,
            scratch_gb=self.scratch_mib / 1024 or 20.0,
            restart=RestartTable(
                first_pause_s=0.2, longest_pause_s=1.0, quarantine_after=QUARANTINE_AFTER, reprobe_s=REPROBE_S
            ),
            recycle=RecycleTable(rss_growth_gb=self.growth_mib / 1024),
        )


def _crash(name: str, title: str, prompt: str, **more: object) -> Case:
    expected = "The caller gets engine_crashed with the cause at once; the next run works."
    return Case(name=name, title=title, expected=expected, prompt=prompt, codes=CRASHED, ends=True, **more)  # type: ignore[arg-type]


def _stillborn(name: str, title: str, code: str, **more: object) -> Case:
    expected = f"The caller gets {code}; the next start works."
    return Case(name=name, title=title, expected=expected, codes=(code,), ends=True, **more)  # type: ignore[arg-type]


def _hang(name: str, title: str, prompt: str, **more: object) -> Case:
    expected = f"The caller gets engine_hung after {STALL_S:g} s without progress; the engine is ended."
    fields = {"codes": HUNG, "within_s": HANG_S, "ends": True} | more
    return Case(name=name, title=title, expected=expected, prompt=prompt, **fields)  # type: ignore[arg-type]


def _harmless(name: str, title: str, prompt: str, answer: str, **more: object) -> Case:
    expected = "Nothing breaks: the run gets its right answer."
    return Case(name=name, title=title, expected=expected, prompt=prompt, answer=answer, **more)  # type: ignore[arg-type]


def _broken(kind: str, title: str) -> Case:
    expected = "The caller gets engine_protocol at once; the engine is ended."
    name, prompt = f"frame-{kind}", f"frame:{kind}"
    return Case(name=name, title=title, expected=expected, prompt=prompt, codes=BROKEN, ends=True)


def _attack(name: str, title: str, prompt: str, **more: object) -> Case:
    expected = "Everything it tries is refused, and nothing of ours was touched."
    return Case(name=name, title=title, expected=expected, prompt=prompt, answer="", linux=True, **more)  # type: ignore[arg-type]


_DYING = (
    _crash("exit", "ends itself with exit code 3", "exit:3"),
    _crash("exit-0", "ends itself with exit code 0", "exit:0"),
    _crash("segv", "crashes with SIGSEGV in mid-call", "crash:SIGSEGV"),
    _crash("abort", "calls abort()", "crash:SIGABRT"),
    _crash("fpe", "divides by zero in native code (SIGFPE)", "crash:SIGFPE"),
    _crash("killed", "is killed from outside (SIGKILL)", "crash:SIGKILL"),
    _crash("crash-streaming", "crashes after three chunks were streamed", "crash-after:3"),
    _crash("crash-beside", "crashes with a second run in flight", "crash:SIGSEGV", beside=True),
    Case(
        name="raise",
        title="raises a Python exception",
        expected="The caller gets engine_failed with the words; the engine lives on.",
        prompt="raise:the words",
        codes=("engine_failed",),
    ),
)

_STARTING = (
    _stillborn("start-exit", "ends before it says hello", "engine_crashed", start="exit:4"),
    _stillborn("start-crash", "crashes while it imports its library", "engine_crashed", start="crash:SIGSEGV"),
    Case(
        name="start-hang",
        title="never says hello",
        expected=f"The caller gets engine_hung after {SHORT_START_S:g} s; the next start works.",
        start="hang",
        codes=HUNG,
        start_s=SHORT_START_S,
        within_s=SHORT_START_S + GRACE_S + SOON_S,
        ends=True,
    ),
    Case(
        name="start-slow",
        title="needs 2 s to say hello",
        expected="It is waited for: the run gets its right answer.",
        start="hang:2",
        answer="hello",
        within_s=2 + SOON_S,
    ),
    Case(
        name="start-noise",
        title="prints on descriptor 1 while it imports",
        expected="Nothing breaks: the run gets its right answer.",
        start="noise",
        answer="hello",
    ),
    _stillborn("load-crash", "crashes while it loads the model", "engine_crashed", load="crash:SIGSEGV"),
    Case(
        name="crash-loop",
        title="crashes in every one of three loads",
        expected="The fourth caller gets quarantined at once; after a while the model is tried again and works.",
        load="crash:SIGSEGV",
        runs=QUARANTINE_AFTER + 1,
        pause_s=0.8,
        codes=(*CRASHED, "quarantined"),
        last_code="quarantined",
        ends=True,
    ),
    _stillborn("load-exit", "ends itself while it loads the model", "engine_crashed", load="exit:3"),
    _stillborn("load-raise", "raises while it loads the model", "load_failed", load="raise"),
    _stillborn("load-fault", "finds its model broken", "model_corrupt", load="fault"),
    Case(
        name="load-stall",
        title="never gets ready",
        expected=f"The caller gets engine_hung after {STALL_S:g} s without progress; the next load works.",
        load="stall",
        codes=HUNG,
        within_s=HANG_S,
        ends=True,
    ),
    Case(
        name="load-slow",
        title="loads for 2.5 s, with progress",
        expected="It is waited for: the run gets its right answer.",
        load="slow:2.5",
        answer="hello",
        within_s=2.5 + SOON_S,
    ),
    Case(
        name="load-memory",
        title="takes 200 MiB while it loads",
        expected="Nothing breaks: the run gets its right answer.",
        load="memory:200",
        answer="hello",
    ),
)

_HANGING = (
    _hang("hang", "hangs in a system call", "hang"),
    _hang("hang-gil", "hangs in native code with the interpreter locked", "hang-gil"),
    _hang("deadlock", "deadlocks two threads", "deadlock"),
    _hang("spin", "loops for ever on one CPU", "spin"),
    _hang("ignore-term", "hangs and ignores SIGTERM", "ignore-term"),
    _hang("stop", "stops itself with SIGSTOP", "stop"),
    _hang("frame-half", "writes half a frame, then hangs", "frame:half"),
    _hang("close-stdin", "closes its input, then hangs", "close-stdin"),
    Case(
        name="close-stdout",
        title="closes its output and stays",
        expected="The caller gets a fault at once; the engine is ended.",
        prompt="close-stdout",
        codes=(*CRASHED, *BROKEN, *HUNG),
        ends=True,
    ),
    Case(
        name="deadline",
        title="works past the job's deadline",
        expected="The caller gets deadline_exceeded at the deadline; the engine lives on.",
        prompt="progress",
        deadline_s=1.0,
        codes=("deadline_exceeded",),
        within_s=1.0 + GRACE_S + SOON_S,
    ),
    Case(
        name="deaf",
        title="ignores that its caller hung up",
        expected=f"The caller is let go {GRACE_S:g} s after it hung up; the engine is replaced.",
        prompt="deaf",
        cancel_after_s=0.3,
        codes=("cancelled",),
        within_s=0.3 + GRACE_S + SOON_S,
        ends=True,
    ),
    Case(
        name="cancel-raises",
        title="raises when it is asked to cancel",
        expected="The caller gets cancelled; the engine lives on.",
        prompt="cancel-raises",
        cancel_after_s=0.3,
        codes=("cancelled",),
        within_s=0.3 + GRACE_S + SOON_S,
    ),
)

_NOISE = (
    _harmless("print", "prints by every road on descriptor 1", "stdout", "quiet"),
    _harmless("flood-stderr", "floods stderr with 16 MiB", "stderr:16", "wrote 16 MiB"),
    _harmless("flood-stdout", "floods stdout with 16 MiB", "flood-stdout:16", "wrote 16 MiB"),
    _harmless("flood-chunks", "streams 20000 chunks at once", "flood-chunks:20000", "sent 20000 chunks"),
    _broken("garbage", "writes garbage instead of a frame"),
    _broken("huge", "announces a header of 16 MiB"),
    _broken("4gib", "announces a frame of 4 GiB"),
    _broken("blobs", "announces a blob of 2 GiB"),
    _broken("64blobs", "announces 64 blobs"),
    _broken("nested", "sends a frame nested 100000 deep"),
    _broken("tag", "sends a message of an unknown kind"),
    _broken("body", "sends a message with a broken body"),
    _broken("run", "answers a run that nobody asked for"),
    _broken("seq", "numbers its chunks wrongly"),
    _broken("hello", "says hello twice"),
    Case(
        name="frame-late",
        title="goes on after its answer",
        expected="The caller keeps the right answer; the engine is ended.",
        prompt="frame:late",
        answer="late",
    ),
    Case(
        name="result-huge",
        title="answers with 65 MiB",
        expected="The caller gets engine_failed; the engine lives on.",
        prompt="result:65",
        codes=("engine_failed",),
        within_s=2 * SOON_S,
    ),
)

_RESOURCES = (
    Case(
        name="leak",
        title="leaks 48 MiB in each of eight runs",
        expected="Every run is answered; the engine is replaced between two of them.",
        prompt="memory:48",
        answer="",
        runs=8,
        pause_s=0.4,
        growth_mib=150,
        recycled=True,
    ),
    Case(
        name="memory",
        title="takes 600 MiB where 300 are allowed",
        expected="The engine is ended at its ceiling; the caller gets out_of_memory.",
        prompt="hoard:600",
        memory_mib=300,
        codes=("out_of_memory",),
        within_s=3 * SOON_S,
        ends=True,
    ),
    Case(
        name="disk",
        title="writes a file of 300 MiB where 100 are allowed",
        expected="The file is cut off, or the engine ended; the caller gets a fault that says so.",
        prompt="disk:300",
        scratch_mib=100,
        codes=("engine_failed", "worker_disk_full", *CRASHED),
        within_s=DISK_S,
    ),
    Case(
        name="disk-many",
        title="writes 300 files of 1 MiB where 100 MiB are allowed",
        expected="The engine is ended at its ceiling; the caller gets a fault that says so.",
        prompt="disk-many:300",
        scratch_mib=100,
        codes=("worker_disk_full", *CRASHED),
        within_s=DISK_S,
        ends=True,
    ),
    Case(
        name="descriptors",
        title="opens 5000 files and keeps them",
        expected="Its own limit, or none: it gets an answer, or the caller engine_failed.",
        prompt="descriptors:5000",
        answer="holds 5000 descriptors",
        codes=("engine_failed",),
    ),
    _crash("orphan", "leaves a child in a session of its own, then dies", "fork:exit", spawns=True),
    _crash("daemon", "leaves a double-forked daemon, then dies", "daemon:exit", spawns=True),
    _harmless("orphan-quiet", "leaves a child that holds its pipes open", "fork", "", spawns=True),
    _harmless("daemon-quiet", "leaves a double-forked daemon", "daemon", "", spawns=True),
    _hang(
        "fork-bomb", "forks 200 processes that ignore SIGTERM", "fork-bomb:200", spawns=True, within_s=HANG_S + SOON_S
    ),
)

_ATTACKS = (
    _attack("spy", "traces and reads the supervisor (ptrace, /proc, memory)", "spy:{victim}"),
    _attack("signal", "sends signals to the supervisor", "signal:{victim}"),
    _attack("meddle", "changes the supervisor's priority and OOM score", "meddle:{victim}"),
    _attack("home", "reads, lists and writes the user's files", "home:{secret}"),
    _attack(
        "sockets",
        "opens TCP, UDP, unix and netlink sockets",
        "sockets:{sockets}",
        managed=("listen", "netlink"),
    ),
    Case(
        name="strays",
        title="leaves files in /dev/shm, /tmp, /var/tmp and the home folder",
        expected="Nothing is left there.",
        prompt="leave:{strays}",
        answer="",
        linux=True,
        managed=("*",),
    ),
    _attack("wreck", "reads and removes files of another engine", "wreck:{neighbour}"),
    Case(
        name="symlink",
        title="hands out a link to the user's file as its output",
        expected="The output is refused; not a byte of the file leaves the box.",
        prompt="symlink:{secret},{secret_size}",
        answer="linked",
        linux=True,
    ),
    Case(
        name="signal-parent",
        title="stops and kills its parent process",
        expected="The engine's family ends; the caller gets a fault.",
        prompt="signal-parent",
        codes=(*CRASHED, *HUNG),
        within_s=HANG_S,
        ends=True,
        linux=True,
    ),
    Case(
        name="stop-parent",
        title="stops the process that holds its leash, then hangs",
        expected=f"The caller gets engine_hung after {STALL_S:g} s; the engine is ended.",
        prompt="stop-parent",
        codes=HUNG,
        within_s=HANG_S,
        ends=True,
        linux=True,
    ),
)


def _grouped(group: str, cases: tuple[Case, ...]) -> tuple[Case, ...]:
    return tuple(msgspec.structs.replace(case, group=group) for case in cases)


CASES: tuple[Case, ...] = (
    *_grouped("dying", _DYING),
    *_grouped("starting", _STARTING),
    *_grouped("hanging", _HANGING),
    *_grouped("talking", _NOISE),
    *_grouped("resources", _RESOURCES),
    *_grouped("attacks", _ATTACKS),
)
