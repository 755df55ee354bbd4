"""What was seen of a case, and whether it was contained. Pure: nothing is assumed, every row is judged here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from protocol import work
from protocol.faults import Fault
from supervisor.host.work import Done, Failed, RunEnd
from supervisor.observe.figures import counted
from supervisor.selftest_cases import Case

# A healthy engine beside a misbehaving one answers within milliseconds; longer than this is harm.
NEIGHBOUR_S = 5.0
GOOD_WORDS = ("verified", "claimed")
_LONGEST_OUTCOME = 400


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """One run of the misdeed: how it ended (None: no answer came), and how long that took the caller."""

    end: RunEnd | None
    seconds: float


class Seen(msgspec.Struct, kw_only=True):
    """Everything that was measured of one case.

    Attributes:
        trouble: why the misdeed could not even be tried, or what broke in the supervisor.
        asked: the runs of the misdeed.
        beside: end of the run that was in flight beside it.
        recovered_s: from the fault to the next right answer of the same model; None: it never came.
        recovery: the latest fault on the way there.
        gone_s: from the fault to the death of the last of the engine's processes; None: some stayed.
        processes: how many of them there were.
        strays: processes of this case after the host was closed.
        files: what was left in the instances' folder.
        answers, wrong, worst_s: of the healthy neighbour: right answers, words about others, longest wait.
        harmed: canaries that were touched.
        refused: why an output file was not taken.
        leaked: the secret, or a file of the user's, came out.
        replaced: the instance is another one than at the start.
        sandbox: layer -> verdict of the misbehaving engine.
    """

    trouble: str = ""
    asked: list[Asked] = []
    beside: RunEnd | None = None
    recovered_s: float | None = None
    recovery: str = ""
    gone_s: float | None = None
    processes: int = 0
    strays: int = 0
    files: list[str] = []
    answers: int = 0
    wrong: list[str] = []
    worst_s: float = 0.0
    harmed: list[str] = []
    refused: str = ""
    leaked: bool = False
    replaced: bool = False
    sandbox: Mapping[str, str] = {}


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the report; the fields of `--json`.

    Attributes:
        seconds: until the caller had its answer or fault, from the request on; the longest of several runs.
        code: the fault's code; "" when the run was answered.
        recovered_s: until the same model answered again.
        gone_s: until the last process of the engine was dead.
        lacks: layers of the sandbox that this box does not have, or that are off.
        neighbour_worst_s: longest wait of a healthy neighbour meanwhile.
    """

    name: str
    group: str
    title: str
    expected: str
    outcome: str
    contained: bool
    seconds: float
    code: str = ""
    recovered_s: float | None = None
    gone_s: float | None = None
    lacks: tuple[str, ...] = ()
    neighbour_worst_s: float = 0.0
    neighbour_answers: int = 0


def judge(case: Case, seen: Seen) -> Row:
    """Put what was seen of a case into a row."""
    wrong = _wrong(case, seen)
    outcome = "; ".join([*wrong, *_missing(case, seen)]) if wrong else _summary(case, seen)
    last = seen.asked[-1] if seen.asked else None
    return Row(
        name=case.name,
        group=case.group,
        title=case.title,
        expected=case.expected,
        outcome=(f"not contained: {outcome}" if wrong else outcome)[:_LONGEST_OUTCOME],
        contained=not wrong,
        seconds=round(max((each.seconds for each in seen.asked), default=0.0), 4),
        code=last.end.fault.code if last is not None and isinstance(last.end, Failed) else "",
        recovered_s=_rounded(seen.recovered_s),
        gone_s=_rounded(seen.gone_s),
        lacks=_lacks(seen),
        neighbour_worst_s=round(seen.worst_s, 4),
        neighbour_answers=seen.answers,
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


# ---- what is wrong


def _wrong(case: Case, seen: Seen) -> list[str]:
    if seen.trouble:
        return [seen.trouble]
    found = [text for each in seen.asked for text in _wrong_end(case, each)]
    last = _said(seen.asked[-1].end) if seen.asked else "nothing"
    if case.last_code and last != case.last_code:
        found.append(f"the last caller got {last}, not {case.last_code}")
    if case.beside and not (isinstance(seen.beside, Failed) and seen.beside.fault.code in case.codes):
        found.append(f"the run in flight beside it ended with {_said(seen.beside)}")
    if seen.recovered_s is None:
        found.append(f"the next run did not work ({seen.recovery or 'no answer'})")
    if case.ends and seen.gone_s is None:
        found.append("processes of the engine outlived its end")
    if seen.strays:
        found.append(f"{counted(seen.strays, 'process', 'processes')} {'was' if seen.strays == 1 else 'were'} left")
    if seen.files:
        verb = "was" if len(seen.files) == 1 else "were"
        found.append(f"{counted(len(seen.files), 'file')} {verb} left, such as {seen.files[0]}")
    if seen.wrong:
        found.append(f"a healthy neighbour was hurt: {seen.wrong[0]}")
    elif not seen.answers:
        found.append("a healthy neighbour gave no answer meanwhile")
    elif seen.worst_s > NEIGHBOUR_S:
        found.append(f"a healthy neighbour had to wait {seen.worst_s:.1f} s")
    if seen.leaked:
        found.append("a file of the user's came out")
    found += seen.harmed
    if case.recycled and not seen.replaced:
        found.append("the engine was never replaced")
    return found


def _wrong_end(case: Case, asked: Asked) -> list[str]:
    found = []
    match asked.end:
        case None:
            return [f"no answer came in {asked.seconds:.1f} s"]
        case Failed(fault=fault):
            if fault.code not in case.codes:
                found.append(f"the caller got {fault.code}: {fault.message}")
        case Done() as done:
            said = said_by(done)
            if case.answer is None:
                found.append(f"the run was answered with {said[:40]!r}")
            elif case.answer and said != case.answer:
                found.append(f"the answer is {said[:40]!r}, not {case.answer!r}")
            elif case.attacks and (managed := _managed(case, said)):
                found.append(f"it managed: {', '.join(managed)}")
    if asked.seconds > case.within_s:
        found.append(f"the caller waited {asked.seconds:.1f} s, not at most {case.within_s:.1f} s")
    return found


def said_by(end: Done) -> str:
    """Text of an answer."""
    return msgspec.msgpack.decode(end.body, type=work.LlmResult).content or ""


def _told(said: str) -> dict[str, Any]:
    """The engine's own report of an attack; one that cannot be read counts as a success of its."""
    try:
        return msgspec.json.decode(said, type=dict[str, Any])
    except msgspec.MsgspecError:
        return {"managed": [f"an answer that cannot be read: {said[:40]!r}"], "refused": {}}


def _managed(case: Case, said: str) -> list[str]:
    if "*" in case.managed:  # only the canaries can tell
        return []
    return [name for name in _told(said)["managed"] if name not in case.managed]


def _said(end: RunEnd | None) -> str:
    match end:
        case Failed(fault=fault):
            return fault.code
        case Done():
            return "an answer"
    return "nothing"


def _lacks(seen: Seen) -> tuple[str, ...]:
    return tuple(f"{layer} {word}" for layer, word in seen.sandbox.items() if word not in GOOD_WORDS)


def _missing(case: Case, seen: Seen) -> list[str]:
    """Which layers this box does not have, where they could have helped."""
    lacks = _lacks(seen) if case.group == "attacks" else ()
    return [f"this box lacks: {', '.join(lacks)}"] if lacks else []


# ---- what happened


def _summary(case: Case, seen: Seen) -> str:
    end = seen.asked[-1].end
    parts = []
    if isinstance(end, Failed):
        parts.append(f"{end.fault.code} ({_cause(end.fault)})")
    elif isinstance(end, Done):
        said = said_by(end)
        if case.attacks and "*" not in case.managed:
            refused = _told(said)["refused"]
            parts.append(f"refused: {', '.join(f'{name} {error}' for name, error in refused.items())}")
        elif seen.refused:
            parts.append(f"refused: {seen.refused.rstrip('.')}")
        elif case.group == "attacks":
            parts.append("nothing reached its target")
        else:
            parts.append("answered rightly")
    if seen.gone_s is not None:
        count = f"its {counted(seen.processes, 'process', 'processes')} gone after {seen.gone_s * 1000:.0f} ms"
        parts.append(count if seen.processes else "no process left")
    if case.recycled:
        parts.append("replaced between two runs")
    if seen.recovered_s is not None:
        parts.append(f"answers again after {seen.recovered_s:.2f} s")
    return "; ".join(parts)


def _cause(fault: Fault) -> str:
    """The fault's message without the name of the engine, which is the same in every row."""
    text = fault.message.removeprefix("Engine misbehave ").rstrip(".")
    return " ".join(text.split())[:160]
