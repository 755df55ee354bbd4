"""The command: table, JSON, exit codes, Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys

import msgspec
import pytest

from supervisor import selftest, selftest_cases, selftest_judge, selftest_run
from supervisor.cli import main
from supervisor.selftest_cases import CASES
from supervisor.selftest_judge import Row

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kit's engine is Linux's")
# The command with two cases that do not end in the time of a test, and that says on stderr which case is done.
COMMAND = """
import sys
import msgspec
from supervisor import selftest_cases, selftest_judge, selftest_run
selftest_cases.STALL_S = selftest_judge.NEIGHBOUR_S = selftest_run.RECOVERY_S = 30.0
long = {"start": "hang", "start_s": 600.0, "within_s": 700.0}
selftest_cases.CASES = tuple(
    msgspec.structs.replace(case, **(long if case.name in ("start-hang", "load-slow") else {"within_s": 60.0}))
    for case in selftest_cases.CASES
)
run_case = selftest_run.run_case
async def told(case, folder, **more):
    row = await run_case(case, folder, **more)
    print("done:", case.name, file=sys.stderr, flush=True)
    return row
selftest_run.run_case = told
from supervisor.cli import main
sys.exit(main())
"""


def row(name: str = "segv", *, contained: bool = True) -> Row:
    return Row(
        name=name,
        group="dying",
        title="crashes",
        expected="It is told.",
        outcome="engine_crashed (killed by SIGSEGV)" if contained else "not contained: 2 processes were left",
        contained=contained,
        seconds=0.0123,
        neighbour_worst_s=0.004,
    )


@pytest.fixture
def pretend(monkeypatch):
    """Let the command have these rows without running anything."""

    def make(*rows: Row, stopped: bool = False) -> None:
        found = {each.name: each for each in rows}
        monkeypatch.setattr(selftest, "run", lambda cases, line, *, mode: (found, stopped))

    return make


def test_one_case_for_real_as_json(capsys, monkeypatch):
    # What other tests take of the processor is no harm.
    for module, name in ((selftest_cases, "STALL_S"), (selftest_judge, "NEIGHBOUR_S"), (selftest_run, "RECOVERY_S")):
        monkeypatch.setattr(module, name, 30.0)
    patient = [msgspec.structs.replace(case, within_s=60.0) for case in CASES if case.name == "exit"]
    monkeypatch.setattr(selftest, "CASES", patient)
    assert main(["selftest", "--case", "exit", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["name"] == "exit"
    assert found["contained"] is True
    assert found["code"] == "engine_crashed"
    assert "exit code 3" in found["outcome"]
    assert 0 < found["seconds"] < 60
    assert {"name", "title", "expected", "outcome", "contained", "seconds"} <= {*found}


def test_the_table_says_what_was_tried_what_happened_how_long_and_whether_it_was_contained(
    pretend, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "160")
    pretend(row())
    assert main(["selftest", "--case", "segv"]) == 0
    head, line, *rest = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "the engine …"
    assert line.split() == "crashes yes 0.01 s 4 ms engine_crashed (killed by SIGSEGV)".split()
    assert "1 of 1 case was contained" in "\n".join(rest)


def test_one_case_that_was_not_contained_is_exit_code_1_and_named(pretend, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    pretend(row(contained=False))
    assert main(["selftest", "--case", "segv"]) == 1
    out = capsys.readouterr().out
    assert "NO" in out
    assert "Not contained: segv; `supervisor selftest --verbose --case segv` says more." in out


def test_what_was_not_tried_is_no_success(pretend, capsys):
    pretend(row("segv"))
    assert main(["selftest", "--case", "segv", "--case", "hang"]) == 1
    assert "1 was not tried to the end: hang." in capsys.readouterr().out


def test_a_case_that_nobody_knows_is_a_wrong_command_line(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["selftest", "--case", "no-such-case"])
    assert ended.value.code == 64
    assert "no-such-case" in capsys.readouterr().err


def test_the_list_tries_nothing(capsys):
    assert main(["selftest", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(CASES) + 1
    assert any(line.split()[0] == "fork-bomb" for line in lines)


def test_the_list_is_json_where_that_is_asked_for(capsys):
    assert main(["selftest", "--list", "--json", "--case", "segv", "--case", "hang"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in found] == ["segv", "hang"]
    assert all(set(each) == {"name", "group", "title", "expected"} and all(each.values()) for each in found)


def test_everything_fits_into_80_columns_of_a_terminal_and_loses_no_word(pretend, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    long = "refused: " + ", ".join(f"attack-{number} PermissionError" for number in range(20))
    rows = [row(), msgspec.structs.replace(row("hang"), outcome=long, title="hangs in " + "a very deep " * 9 + "loop")]
    rows[1] = msgspec.structs.replace(rows[1], contained=False)
    pretend(*rows)
    assert main(["selftest", *(word for each in rows for word in ("--case", each.name))]) == 1
    out = capsys.readouterr().out
    table = out.split("\n\n")[0].splitlines()
    assert all(len(line) <= 80 for line in table), table
    assert table[0].split("  ")[0] == "contained"
    assert table[1].split() == "yes 0.01 s 4 ms crashes".split()
    for each in rows:
        assert " ".join(each.outcome.split()) in " ".join(out.split())
        assert " ".join(each.title.split()) in " ".join(out.split())
    assert all(len(line) <= 80 for line in out.splitlines() if not line.startswith("New meanwhile"))
    assert main(["selftest", "--list"]) == 0
    assert all(len(line) <= 80 for line in capsys.readouterr().out.splitlines())
    assert main(["selftest", "--wide", "--case", "segv", "--case", "hang"]) == 1
    assert len(capsys.readouterr().out.split("\n\n")[0].splitlines()) == 3


def test_a_wide_terminal_gets_the_table(pretend, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    pretend(row())
    assert main(["selftest", "--case", "segv"]) == 0
    assert capsys.readouterr().out.startswith("the engine …")


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_drawn_on_a_terminal_only_and_removed():
    terminal, file = _Terminal(), io.StringIO()
    for stream in (terminal, file):
        line = selftest.ProgressLine(stream, 69)
        line.show(3, ["hang", "spin"])
        line.close()
    assert "3 of 69 done; now hang, spin" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\033[K")
    assert file.getvalue() == ""


def test_ctrl_c_ends_every_child_removes_the_folder_and_prints_what_was_done(tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    words = ["selftest", "--case", "raise", "--case", "start-hang", "--case", "load-slow"]
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        until_done = iter(process.stderr.readline, "")
        assert "done: raise\n" in until_done  # reads so far and no further
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "raises a Python exception" in out
    assert "1 of 1 case was contained" in out
    assert "stopped; 2 of 3 cases were not tried to the end" in err
    assert [*tmp_path.iterdir()] == []
