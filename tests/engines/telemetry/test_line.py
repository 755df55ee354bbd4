"""The line, the questions and the leash of the readers, with real pipes and a real child."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from engines.telemetry.line import Line, Questions

ROOT = Path(__file__).parents[3]
CHILD = """
import sys, threading
sys.path.insert(0, {root!r})
from engines.telemetry import line
out = line.take_line()
line.die_with_parent()
print("a library prints", flush=True)
questions = line.Questions()
questions.listen()
out.send({{"t": "ready"}})
asked = 0
while True:
    asked = questions.wait(asked, 30)
    out.send({{"asked": asked}})
"""


@pytest.fixture
def child():
    with subprocess.Popen(
        [sys.executable, "-I", "-c", CHILD.format(root=str(ROOT))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        yield process
        process.kill()


def test_what_libraries_print_is_no_line(child):
    assert json.loads(child.stdout.readline()) == {"t": "ready"}
    child.stdin.close()
    assert b"a library prints" in child.stderr.read()


def test_a_question_is_heard_at_once_and_nonsense_is_not(child):
    child.stdout.readline()
    for words in (
        b"hello\nread\nread x\nread -1\nread 99999999999999999999\n" + b"z" * 10_000 + b"\n",
        b"re",
        b"ad 7\n",
    ):
        child.stdin.write(words)
        child.stdin.flush()
    assert json.loads(child.stdout.readline()) == {"asked": 7}


def test_the_end_of_the_input_ends_the_process(child):
    child.stdout.readline()
    child.stdin.close()
    assert child.wait(timeout=60) == 0


def test_nobody_listening_ends_the_process(child):
    child.stdout.readline()
    child.stdout.close()
    child.stdin.write(b"read 1\n")
    child.stdin.flush()
    assert child.wait(timeout=60) == 0


def test_lines_of_two_threads_do_not_mix():
    ours, theirs = os.pipe()
    line = Line(theirs)
    threads = [
        threading.Thread(target=lambda n=n: [line.send({"n": n, "pad": "x" * 9000}) for _ in range(50)])
        for n in range(2)
    ]
    for thread in threads:
        thread.start()
    with os.fdopen(ours, "rb") as file:
        seen = [json.loads(file.readline())["n"] for _ in range(100)]
    for thread in threads:
        thread.join()
    os.close(theirs)
    assert sorted(seen) == [0] * 50 + [1] * 50


def test_waiting_ends_with_the_patience():
    assert Questions().wait(0, 0.01) == 0
