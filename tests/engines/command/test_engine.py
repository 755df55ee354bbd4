"""Real programs on the real wire: what callers may choose, how programs end, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time

import pytest

from engines.command.engine import CommandEngine
from protocol.engine_wire import Cancel, Model, Progress, Ready
from protocol.faults import Fault

MODEL = "tool"


@pytest.fixture
def load(spawn):
    """Start the engine with a program in Python; `{name}` places in `argv`."""

    def start(program, *argv, **options):  # noqa: ANN002, ANN003
        child = spawn("command")
        program = program.replace("{", "{{").replace("}", "}}")
        options["argv"] = [sys.executable, "-I", "-c", program, *argv]
        ready = child.load(Model(name=MODEL, options=options))
        assert isinstance(ready, Ready), ready
        return child

    return start


def _until_text(child, text):
    """Receive until a line of the program's output is `text`; the line before the first space of others."""
    while True:
        message = child.receive()
        if isinstance(message, Progress) and message.text.startswith(text):
            return message.text


def _wait_gone(pid):
    """Until no process has this pid. A pidfd becomes readable when the process has ended."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([pidfd], [], [], 60)[0], f"{pid} still runs"
    finally:
        os.close(pidfd)


# ---- what the program gets


def test_the_callers_words_stay_one_argument_each(load):
    child = load("import sys, json; print(json.dumps(sys.argv[1:]))", "{a}", "--b={b}", "{n}")
    answer = child.run("command", {"args": {"a": "x y; $(id) 'q' \n z", "b": "-rf", "n": -1.5}})
    assert json.loads(answer.body.output_tail[0]) == ["x y; $(id) 'q' \n z", "--b=-rf", "-1.5"]


def test_inputs_folder_and_config_reach_the_program(load, tmp_path):
    program = "import sys; a, c, f = sys.argv[1:]; open(f + '/out.bin', 'w').write(open(a).read() + open(c).read())"
    child = load(program, "{input:data}", "{config}", "{folder}", config_name="job.json")
    data = tmp_path / "data"
    data.write_text("from the input ")
    answer = child.run("command", {"config": {"b": [1], "a": None}}, inputs={"data": data})
    assert answer.body.exit_code == 0
    (file,) = answer.result.files
    assert (file.name, file.mime) == ("out.bin", "application/octet-stream")
    assert answer.files[0].read_text() == 'from the input {"b":[1],"a":null}'


def test_a_text_config_is_written_as_it_is(load):
    child = load("import sys; print(open(sys.argv[1]).read())", "{config}", config_name="job.toml")
    assert child.run("command", {"config": "a = 1"}).body.output_tail == ["a = 1"]


def test_the_environment_is_the_operators_plus_what_callers_may_set(load):
    child = load(
        "import os; print(os.environ['MODE'], os.environ['LEVEL'], 'HOME' in os.environ, os.getcwd())",
        env={"MODE": "fast", "LEVEL": "1"},
        env_allow=["LEVEL"],
    )
    answer = child.run("command", {"env": {"LEVEL": "9"}})
    assert answer.body.output_tail == [f"fast 9 True {answer.folder}"]


def test_a_working_folder_of_the_operators(load, tmp_path):
    child = load("import os; print(os.getcwd())", cwd=str(tmp_path))
    assert child.run("command", {}).body.output_tail == [str(tmp_path)]


def test_a_missing_input_is_named(load):
    answer = load("", "{input:audio}").run("command", {})
    assert (answer.fault.code, answer.fault.field) == ("invalid_request", "inputs.audio")


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({}, "args.a"),
        ({"args": {"a": 1, "b": 2}}, "args.b"),
        ({"args": {"a": 1, "folder": "/"}}, "args.folder"),
        ({"args": {"a": "-x"}}, "args.a"),
        ({"args": {"a": "nope"}}, "args.a"),
        ({"args": {"a": 1}, "env": {"PATH": "/tmp"}}, "env.PATH"),
        ({"args": {"a": 1}, "config": {}}, "config"),
    ],
)
def test_everything_else_is_refused_by_name_before_the_start(load, params, field):
    child = load("", "{a}", "{folder}", args={"a": "[0-9]+"})
    answer = child.run("command", params)
    assert not answer.started
    assert (answer.fault.code, answer.fault.field) == ("invalid_parameter", field)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({}, "options.argv"),
        ({"argv": "ls"}, "options.argv"),
        ({"argv": ["no-such-program-here"]}, "options.argv"),
        ({"argv": ["{x}"]}, "options.argv"),
        ({"argv": ["ls", "{config}"]}, "options.config_name"),
        ({"argv": ["ls"], "config_name": "../x"}, "options.config_name"),
        ({"argv": ["ls"], "cwd": "/no/such/folder"}, "options.cwd"),
        ({"argv": ["ls"], "args": {"x": "."}}, "options.args"),
        ({"argv": ["ls", "{x}"], "args": {"x": "("}}, "options.args.x"),
        ({"argv": ["ls"], "exit_codes": {"0": "out_of_memory"}}, "options.exit_codes"),
        ({"argv": ["ls"], "exit_codes": {"3": "nonsense"}}, "options.exit_codes"),
        ({"argv": ["ls"], "env_allow": ["A B"]}, "options.env"),
        ({"argv": ["ls"], "slots": 0}, "options.slots"),
        ({"argv": ["ls"], "shell": True}, "options.shell"),
    ],
)
def test_a_bad_configuration_is_a_failed_load(spawn, options, field):
    fault = spawn("command").load(Model(name=MODEL, options=options))
    assert isinstance(fault, Fault), fault
    assert (fault.code, fault.field) == ("load_failed", field)


# ---- what comes back


def test_output_is_progress_line_by_line(load):
    program = (
        "import sys, os\nprint('one')\nprint('two', file=sys.stderr)\nsys.stdout.flush()\n"
        "os.write(1, b'bar 1\\rbar 2\\r\\nbad \\xff byte\\n' + b'z' * 20000 + b'\\nlast')"
    )
    answer = load(program).run("command", {})
    texts = [report.text for report in answer.progress]
    assert sorted(texts[:2]) == ["one", "two"]
    assert texts[2:5] == ["bar 1", "bar 2", "bad � byte"]
    assert texts[5] == "z" * 8192 + "…"
    assert texts[6:] == ["last"]
    assert [report.n for report in answer.progress] == list(range(1, 8))


def test_only_plain_files_come_back_and_the_rest_is_told(load):
    program = (
        "import os\nopen('b.txt', 'w').write('b')\nopen('a.png', 'wb').write(b'png')\nos.mkdir('sub')\n"
        "open('sub/deep', 'w')\nos.symlink('/etc/passwd', 'link')\nos.mkfifo('pipe')\nopen('.hidden', 'w')\n"
        "open(b'odd\\xff', 'w')\nopen('new\\nline', 'w')"
    )
    answer = load(program).run("command", {})
    assert [(file.name, file.mime) for file in answer.result.files] == [("a.png", "image/png"), ("b.txt", "text/plain")]
    told = "\n".join(answer.body.output_tail)
    for name in ("sub", "link", "pipe", ".hidden", "odd", "new"):
        assert name in told
    assert [report.text for report in answer.progress if report.phase == "files"] == answer.body.output_tail


# ---- how it ends


@pytest.mark.parametrize(
    ("code", "fault", "retry"),
    [
        (42, "out_of_memory", True),
        (7, "invalid_request", False),
        (1, "command_failed", False),
        (3, "engine_hung", True),
    ],
)
def test_exit_codes(load, code, fault, retry):
    program = f"import sys; print('last words'); sys.exit({code})"
    answer = load(program, exit_codes={"7": "invalid_request", "3": "engine_hung"}).run("command", {})
    assert (answer.fault.code, answer.fault.may_retry) == (fault, retry)
    assert answer.fault.detail == {"exit_code": code, "stderr_tail": ["last words"]}
    assert f"exit code {code}" in answer.fault.message


def test_a_signal_is_told(load):
    answer = load("import os; os.kill(os.getpid(), 11)").run("command", {})
    assert (answer.fault.code, answer.fault.may_retry) == ("command_failed", False)
    assert answer.fault.detail["signal"] == signal.SIGSEGV
    assert "SIGSEGV" in answer.fault.message


def test_a_program_that_vanished_after_the_load(spawn, tmp_path):
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    child = spawn("command")
    assert isinstance(child.load(Model(name=MODEL, options={"argv": [str(program)]})), Ready)
    program.unlink()
    answer = child.run("command", {})
    assert answer.fault.detail["exit_code"] == 127
    assert answer.fault.detail["stderr_tail"] == [f"{program}: No such file or directory"]


_FAMILY = """
import os, signal, time, sys
{mood}
def stay():
    while True:
        time.sleep(100)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        stay()
    stay()
if os.fork() == 0:
    stay()
print("ready", os.getpid(), flush=True)
{end}
"""


def _family(pid):
    """The program and everything below it, through /proc."""
    found = [pid]
    for parent in found:
        with open(f"/proc/{parent}/task/{parent}/children") as file:
            found += [int(word) for word in file.read().split()]
    return found


def _grown_family(pid):
    until = time.monotonic() + 60
    while len(family := _family(pid)) != 4:
        assert time.monotonic() < until, f"family of {family}"
        time.sleep(0.005)
    return family


@pytest.mark.parametrize("mood", ["", "signal.signal(signal.SIGTERM, signal.SIG_IGN)"])
def test_cancel_ends_the_whole_family(load, mood):
    child = load(_FAMILY.format(mood=mood, end="stay()"), grace_s=0.2)
    answer = child.begin("command", {})
    family = _grown_family(int(_until_text(child, "ready").split()[1]))
    child.send(Cancel(run=1))
    assert child.finish(answer).fault.code == "cancelled"
    for pid in family:
        _wait_gone(pid)


def test_a_program_that_ends_leaves_no_family(load):
    child = load(_FAMILY.format(mood="", end="while not os.path.exists('go'): time.sleep(0.01)"))
    answer = child.begin("command", {})
    family = _grown_family(int(_until_text(child, "ready").split()[1]))
    (answer.folder / "go").touch()
    assert child.finish(answer).body.exit_code == 0
    for pid in family:
        _wait_gone(pid)


def test_the_family_dies_with_the_engine(load):
    child = load(_FAMILY.format(mood="signal.signal(signal.SIGTERM, signal.SIG_IGN)", end="stay()"))
    child.begin("command", {})
    family = _grown_family(int(_until_text(child, "ready").split()[1]))
    child.process.kill()
    for pid in family:
        _wait_gone(pid)


def test_a_polite_program_may_clean_up_within_the_grace(load):
    program = (
        "import os, signal, sys, time\n"
        "def bye(*_):\n    os.write(1, b'bye\\n')\n    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, bye)\nprint('ready', flush=True)\ntime.sleep(100)"
    )
    child = load(program, grace_s=20)
    answer = child.begin("command", {})
    _until_text(child, "ready")
    child.send(Cancel(run=1))
    child.finish(answer)
    assert answer.fault.code == "cancelled"
    assert [report.text for report in answer.progress] == ["bye"]


def test_two_slots_run_side_by_side_and_cancel_hits_one(load):
    child = load("import time\nprint('ready', flush=True)\ntime.sleep(100)", slots=2, grace_s=1)
    first, second = child.begin("command", {}), child.begin("command", {})
    seen = set()
    while seen != {1, 2}:
        if isinstance(message := child.receive(), Progress):
            seen.add(message.run)
    child.send(Cancel(run=2))
    assert child.finish(second, 2).fault.code == "cancelled"
    child.send(Cancel(run=1))
    assert child.finish(first, 1).fault.code == "cancelled"


def test_the_fixture_answers_right(spawn):
    fixture = CommandEngine.fixture("")
    child = spawn("command")
    assert isinstance(child.load(fixture.model), Ready)
    case = fixture.cases[0]
    answer = child.run(case.kind, case.params)
    assert case.check(answer.body, answer.files) == ""
    assert case.check(answer.body, []) != ""
