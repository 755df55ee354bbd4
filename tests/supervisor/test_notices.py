from __future__ import annotations

import io
import logging

import msgspec
import pytest

from supervisor.notices import set_up
from supervisor.settings import LogTable


@pytest.fixture(autouse=True)
def _restore():
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    root.handlers[:] = before
    root.setLevel(level)


def written(table: LogTable, emit) -> str:
    stream = io.StringIO()
    set_up(table, stream, {})
    emit(logging.getLogger("supervisor.link.session"))
    return stream.getvalue()


def test_text_has_time_level_name_sentence_and_extras():
    line = written(LogTable(), lambda log: log.warning("lost %s", "it", extra={"job": "job_1"}))
    assert line.endswith(" warning link.session: lost it job=job_1\n")
    assert line[4] == "-"
    assert line[10] == " "


def test_json_is_one_object_a_line_also_with_a_traceback():
    def emit(log):
        try:
            raise ValueError("broken\nin two")
        except ValueError:
            log.exception("went wrong", extra={"attempt": 2})

    text = written(LogTable(format="json"), emit)
    assert text.count("\n") == 1
    fields = msgspec.json.decode(text)
    assert fields["message"] == "went wrong"
    assert fields["level"] == "error"
    assert fields["attempt"] == 2
    assert "ValueError: broken" in fields["traceback"]
    assert fields["ts"].endswith("Z")


def test_level_and_chatty_libraries():
    def emit(log):
        log.debug("hidden")
        log.info("shown")
        logging.getLogger("httpx").info("GET …")

    assert written(LogTable(), emit).splitlines()[0].endswith("shown")
    assert "GET" not in written(LogTable(), emit)
    assert "GET" in written(LogTable(level="debug"), emit)


def test_the_journal_gets_a_severity_and_no_time(capsys):
    set_up(LogTable(), None, {"JOURNAL_STREAM": "8:1"})
    logging.getLogger("supervisor.app").error("one\ntwo")
    assert capsys.readouterr().err == "<3>error app: one\n<3>two\n"
