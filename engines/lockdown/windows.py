"""The launcher's part on Windows: there is no exec, so the launcher stays until the engine has ended, and ends as it.

What holds the engine is the Job Object that the supervisor puts the launcher into (supervisor/host/containment): the
engine is born in it. No layer of a sandbox is put on here. It has not run on Windows yet.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False  # what start.py says of `typing`
if TYPE_CHECKING:
    import signal
    from typing import NoReturn
else:
    import _signal as signal


def become(argv: list[str], environment: dict[str, str]) -> NoReturn:
    """Run a program in our place and end as it does; what Ctrl-C and Ctrl-Break ask for is its to answer."""
    for name in ("SIGINT", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    os._exit(exit_code(os.spawnve(os.P_WAIT, argv[0], [quoted(word) for word in argv], environment)))


def folders(environment: dict[str, str]) -> dict[str, str]:
    """What Windows calls HOME and TMPDIR, where the environment has them."""
    names = {"USERPROFILE": "HOME", "TEMP": "TMPDIR", "TMP": "TMPDIR"}
    return {theirs: environment[ours] for theirs, ours in names.items() if ours in environment}


def quoted(word: str) -> str:
    """A word as the C runtime takes it apart again: spawn only joins its arguments with blanks."""
    made, slashes = "", 0
    for each in word:
        if each == "\\":
            slashes += 1
            continue
        # Backslashes count only before a quotation mark, and then twice.
        made += "\\" * (slashes * 2 + 1 if each == '"' else slashes) + each
        slashes = 0
    if word and " " not in word and "\t" not in word:
        return made + "\\" * slashes
    return '"' + made + "\\" * slashes * 2 + '"'


def exit_code(code: int) -> int:
    """An NTSTATUS such as 0xC0000005 as the signed number that os._exit takes."""
    return code - 2**32 if code >= 2**31 else code
