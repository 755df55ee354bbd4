from __future__ import annotations

import io
import logging
import stat
from pathlib import Path

import msgspec
import pytest

from supervisor import notices
from supervisor.errors import ConfigError
from supervisor.notices import set_up
from supervisor.observe.context import about
from supervisor.observe.logfile import LogFile
from supervisor.settings import LogTable


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not in the file when `close` stops waiting is lost: too soon where other tests have the processor."""
    monkeypatch.setattr(LogFile.close, "__defaults__", (30.0,))


@pytest.fixture(autouse=True)
def _restore(_patient: None):
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    notices.close()
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


TOKEN = "bhw_8hQ3vXk29LmZpR7tYw4cNfB6sJd1gAe5uKi0oTqVxWy"
WORDS = "my secret diary says"


@pytest.mark.parametrize("form", ["text", "json"])
def test_nothing_leaks_into_stderr_the_file_or_the_ring(tmp_path: Path, form: str):
    stream, path = io.StringIO(), tmp_path / "worker.log"
    made = set_up(LogTable(format=form, file=str(path)), stream, {})  # type: ignore[arg-type]
    log = logging.getLogger("supervisor.link.session")
    with about(job="j1", attempt=2, model="m"):
        log.info("with %s", TOKEN, extra={"prompt": WORDS, "headers": {"Authorization": f"Bearer {TOKEN}"}})
        log.info("asked %s", {"messages": [WORDS]})
        try:
            raise ValueError(f"prompt={WORDS} token={TOKEN}")
        except ValueError:
            log.exception("went wrong")
    made.close()
    told = (stream.getvalue(), path.read_text(), msgspec.json.encode(made.ring.since()).decode())
    for text in told:
        assert TOKEN[4:] not in text
        assert WORDS not in text
        assert "went wrong" in text
        assert "ValueError" in text
    assert [(entry.job, entry.attempt, entry.model) for entry in made.ring.since()] == [("j1", 2, "m")] * 3
    lines = [msgspec.json.decode(line) for line in path.read_text().splitlines()]
    assert [line["job"] for line in lines] == ["j1"] * 3
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_that_cannot_be_written_is_told_and_ends_nothing(tmp_path: Path):
    (tmp_path / "file").write_text("")
    stream = io.StringIO()
    made = set_up(LogTable(file=str(tmp_path / "file" / "worker.log")), stream, {})
    logging.getLogger("supervisor.app").info("works")
    made.close()
    assert "works" in stream.getvalue()
    assert "cannot be written: File exists" in stream.getvalue()
    assert made.dropped()["file"] >= 1


def test_the_level_changes_while_it_runs():
    stream = io.StringIO()
    set_up(LogTable(), stream, {})
    log = logging.getLogger("supervisor.app")
    log.debug("before")
    notices.set_level("debug", for_s=60)
    log.debug("meanwhile")
    notices.set_level("info")
    log.debug("after")
    assert [word for word in ("before", "meanwhile", "after") if word in stream.getvalue()] == ["meanwhile"]
    assert "log level debug for 60 s" in stream.getvalue()
    with pytest.raises(ValueError, match="level must be one of"):
        notices.set_level("loud")


def test_a_new_set_up_replaces_the_old_and_closes_it(tmp_path: Path):
    first = set_up(LogTable(file=str(tmp_path / "first.log")), io.StringIO(), {})
    logging.getLogger("supervisor.app").info("one")
    second = set_up(LogTable(), io.StringIO(), {})
    logging.getLogger("supervisor.app").info("two")
    assert "one" in (tmp_path / "first.log").read_text()
    assert "two" not in (tmp_path / "first.log").read_text()
    assert [entry.message for entry in second.ring.since()] == ["two"]
    assert first.ring.last == 1
    assert len(logging.getLogger().handlers) == 1


def test_sentry_that_is_asked_for_and_cannot_be_had_is_an_error(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"sentry_dsn_file: .* cannot be read"):
        set_up(LogTable(sentry_dsn_file=str(tmp_path / "none")), io.StringIO(), {})
