"""What changes live: a file is written, the reloader reads it, and the part that it concerns behaves otherwise."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from supervisor import notices
from supervisor.config import build_models, load
from supervisor.errors import ConfigError
from supervisor.host.fake import FakeChild, FakeEngines, fake_means, greet_and_load
from supervisor.host.host import open_host
from supervisor.host.work import Failed, ModelSpec, RunRequest
from supervisor.intake.holds import Source
from supervisor.live_settings import Parts, appliers
from supervisor.observe.logfile import LogFile
from supervisor.reload import Outcome, Reloader
from supervisor.reload_plan import APPLY, Apply, apply_of
from supervisor.settings import HoldsTable, LimitsTable, LogTable, Settings
from tests.supervisor.holds_world import World

# Until the host has it, what needs it waits for a restart.
MODEL = '[[models]]\nname = "synthetic-a"\nengine = "synthetic"\n'


class Running:
    """A supervisor's settings, its file and its reloader."""

    def __init__(self, folder: Path, parts: Parts, text: str = "") -> None:
        self.path = folder / "worker.toml"
        self.path.write_text(text)
        self.settings = load(self.path, {})
        self._reloader = Reloader(
            self.path, self.settings, appliers(lambda: self.settings, self._take, parts), environ={}
        )

    def _take(self, settings: Settings) -> None:
        self.settings = settings

    async def save(self, text: str) -> Outcome:
        self.path.write_text(text)
        return await self._reloader.reload("asked")


def all_parts(**more: Any) -> Parts:
    given = {name: lambda *_: None for name in Parts.__dataclass_fields__} | more
    return Parts(**given)


# ---- the table and the appliers agree


def keys(type_: Any, at: str = "") -> list[str]:
    """Every single key of the configuration; what free tables hold is left out."""
    found = []
    for field in msgspec.structs.fields(type_):
        key, inner = f"{at}.{field.encode_name}".removeprefix("."), field.type
        if getattr(inner, "__origin__", None) is list and hasattr(inner.__args__[0], "__struct_fields__"):
            found += keys(inner.__args__[0], f"{key}.*")
        else:
            found += keys(inner, key) if hasattr(inner, "__struct_fields__") else [key]
    return found


def test_what_is_said_to_be_live_has_an_applier_and_nothing_else_has():
    known = appliers(Settings, lambda _: None, all_parts())
    taken = {key for key in keys(Settings) if any(key == one or key.startswith(f"{one}.") for one in known)}
    assert taken == {key for key in keys(Settings) if apply_of(key) is Apply.LIVE}
    assert len(taken) > 50
    assert not [
        key for key in APPLY if not any(known == key or known.startswith(f"{key}.") for known in keys(Settings))
    ]


def test_a_part_that_is_not_there_leaves_its_keys_to_a_restart():
    assert set(appliers(Settings, lambda _: None)) == {
        "config_version", "log.level", "worker.labels", "limits.drain_s",
    }  # fmt: skip


# ---- each key, from the file to what it does


async def test_what_the_supervisor_reads_itself(tmp_path):
    running = Running(tmp_path, Parts())
    outcome = await running.save(
        "limits.drain_s = 7\nlimits.stall_s = 8\n[worker]\nname = 'x'\nlabels = { rack = '3' }\n"
    )
    assert (running.settings.limits.drain_s, running.settings.worker.labels) == (7, {"rack": "3"})
    assert (running.settings.limits.stall_s, running.settings.worker.name) == (120, ""), "these are not in force"
    assert {change.key for change in outcome.applied} == {"limits.drain_s", "worker.labels.rack"}
    assert {change.key for change in outcome.restart} == {"limits.stall_s", "worker.name"}
    assert {row["key"] for row in outcome.plain()["restart"]} == {"limits.stall_s", "worker.name"}


async def test_the_level_of_the_log(tmp_path, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(notices, "set_level", told.append)
    running = Running(tmp_path, Parts())
    await running.save("log.level = 'debug'")
    assert (told, running.settings.log.level) == (["debug"], "debug")


async def test_holds(tmp_path, autojump_clock, nursery):
    world = World(HoldsTable())
    nursery.start_soon(world.watch.run)
    await trio.sleep(3)
    assert world.reason() == ""
    running = Running(tmp_path, Parts(holds=world.watch.apply))
    outcome = await running.save("[holds.schedule]\nquiet = ['00:00-00:00']\ntime_zone = 'UTC'\n")
    assert {change.key for change in outcome.applied} == {"holds.schedule.quiet", "holds.schedule.time_zone"}
    await trio.sleep(3)
    assert Source.SCHEDULE in {hold.source for hold in world.keeper.holds().items}
    await running.save("[holds.schedule]\nquiet = ['00:00-00:00']\nmode = 'off'\n")
    await trio.sleep(3)
    assert world.keeper.holds().items == ()
    outcome = await running.save("[holds.schedule]\nquiet = ['25:00-00:00']\n")
    assert len(outcome.problems) == 1
    assert running.settings.holds.schedule.mode == "off", "the old one stays in force"


async def silent(child: FakeChild) -> None:
    await greet_and_load(child)
    await trio.sleep_forever()


@pytest.mark.parametrize(
    ("line", "code", "within_s"),
    [("first_output_s = 2", "engine_hung", 3), ("job_s = 2", "deadline_exceeded", 3)],
)
async def test_the_limits_of_runs(tmp_path, autojump_clock, line, code, within_s):
    old = "[limits]\nfirst_output_s = 50\njob_s = 80\ncancel_grace_s = 30\n"
    fakes = FakeEngines(silent)
    before = load(_written(tmp_path, old + MODEL), {})
    async with open_host(build_models(before), before.limits, tmp_path / "s", means=fake_means(fakes)) as host:
        running = Running(tmp_path, Parts(host=host.apply), old + MODEL)
        name, _, value = line.partition(" = ")
        outcome = await running.save(
            old.replace(f"{name} = {50 if 'first' in name else 80}", f"{name} = {value}") + MODEL
        )
        assert [change.key for change in outcome.applied] == [f"limits.{name}"]
        start = trio.current_time()
        end = await host.run(
            RunRequest(model="synthetic-a", kind="llm", params=b"\x80", folder=tmp_path), lambda _: None
        )
        assert isinstance(end, Failed)
        assert (end.fault.code, trio.current_time() - start < within_s) == (code, True)


def _written(folder: Path, text: str) -> Path:
    path = folder / "worker.toml"
    path.write_text(text)
    return path


async def test_models_and_limits_reach_the_host_with_nothing_else_changed(tmp_path):
    told: list[tuple[LimitsTable, Sequence[ModelSpec]]] = []
    running = Running(tmp_path, all_parts(host=lambda *what: told.append(what)), MODEL)
    outcome = await running.save(
        f"[limits]\nload_s = 5\nmemory_gb = 3\n[limits.restart]\nhealthy_s = 9\n{MODEL}stall_s = 4\n"
    )
    limits, (spec,) = told[-1]
    assert (limits.load_s, limits.restart.healthy_s, limits.memory_gb) == (5, 9, 0)
    assert (spec.stall_s, spec.model.device, spec.memory_bytes) == (4, "auto", 0)
    assert {change.key for change in outcome.restart} == {"limits.memory_gb"}
    assert running.settings.models[0].stall_s == 4


async def test_models_and_engines_reach_whoever_has_them_come_and_go_and_are_in_force(tmp_path):
    followed: list[Settings] = []
    tuned: list[Sequence[ModelSpec]] = []
    parts = all_parts(models=followed.append, host=lambda _limits, specs: tuned.append(specs))
    running = Running(tmp_path, parts, MODEL)
    extra = MODEL.replace("synthetic-a", "synthetic-b")
    outcome = await running.save(f"{MODEL}device = 'cpu'\n{extra}[engines.synthetic]\noptions = {{ tokens = 1 }}\n")
    assert outcome.restart == ()
    assert {change.key for change in outcome.applied} == {
        "models.synthetic-a.device", "models.synthetic-b", "engines.synthetic",
    }  # fmt: skip
    assert all(each == running.settings for each in followed), "never one table without the other"
    assert [spec.model.options for spec in tuned[-1]] == [{"tokens": 1}] * 2
    await running.save("")
    assert followed[-1].models == []


async def test_models_that_nobody_can_have_come_and_go_wait_for_a_restart(tmp_path):
    running = Running(tmp_path, Parts(), MODEL)
    outcome = await running.save("")
    assert [change.key for change in outcome.restart] == ["models.synthetic-a"]
    assert len(running.settings.models) == 1


async def test_the_log_and_one_that_cannot_be_had(tmp_path, caplog):
    told: list[LogTable] = []

    def take(table: LogTable) -> None:
        if table.file.endswith("bad"):
            raise ConfigError(["log.file: no"])
        told.append(table)

    running = Running(tmp_path, Parts(log=take))
    await running.save("[log]\nformat = 'json'\nkeep = 2\n")
    assert [(table.format, table.keep) for table in told] == [("json", 5), ("json", 2)]
    with caplog.at_level(logging.WARNING):
        outcome = await running.save("[log]\nformat = 'json'\nkeep = 2\nfile = 'bad'\n")
    assert outcome.problems == ("log.file: could not be taken up: log.file: no",)
    assert [change.key for change in outcome.restart] == ["log.file"]
    assert running.settings.log.file == ""


async def test_the_log_goes_on_in_another_form_and_file(tmp_path, monkeypatch):
    monkeypatch.setattr(LogFile.close, "__defaults__", (30.0,))  # for the last lines, on a machine that is busy
    stream = io.StringIO()
    made = notices.set_up(LogTable(), stream)
    running = Running(tmp_path, Parts(log=made.apply))
    log = logging.getLogger("supervisor.test")
    log.warning("first")
    outcome = await running.save(f"[log]\nformat = 'json'\nfile = '{tmp_path}/a.log'\n")
    assert {change.key for change in outcome.applied} == {"log.format", "log.file"}
    log.warning("second")
    await running.save(f"[log]\nfile = '{tmp_path}/b.log'\n")
    log.warning("third")
    notices.close()
    lines = [line for line in stream.getvalue().splitlines() if "test: " in line or '"supervisor.test"' in line]
    assert [line[0] == "{" for line in lines] == [False, True, False]
    first, second = (tmp_path / "a.log").read_text(), (tmp_path / "b.log").read_text()
    assert ("second" in first, "third" in first, "second" in second, "third" in second) == (True, False, False, True)
