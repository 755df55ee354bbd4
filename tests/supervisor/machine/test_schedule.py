"""Quiet hours, by the clock on the wall of some place."""

from __future__ import annotations

import datetime
import os
import time
import zoneinfo

import pytest

from supervisor.intake.observed import Unknown
from supervisor.machine.schedule import Schedule, parse, schedule_reader

ZURICH = "Europe/Zurich"  # 2026: clocks go forward on 29 March at 02:00 (to 03:00), back on 25 October at 03:00


def at(text: str, zone: str = ZURICH, fold: int = 0) -> float:
    moment = datetime.datetime.fromisoformat(text).replace(tzinfo=zoneinfo.ZoneInfo(zone), fold=fold)
    return moment.timestamp()


def utc(text: str) -> float:
    return datetime.datetime.fromisoformat(text).replace(tzinfo=datetime.UTC).timestamp()


NIGHT = ["22:00-07:00"]
WORK = ["mon-fri 08:00-18:00"]


@pytest.mark.parametrize(
    ("quiet", "now", "until"),
    [
        # 2026-11-21 is a Saturday
        (NIGHT, "2026-11-21 21:59:59", None),
        (NIGHT, "2026-11-21 22:00", "2026-11-22 07:00"),
        (NIGHT, "2026-11-22 03:00", "2026-11-22 07:00"),
        (NIGHT, "2026-11-22 06:59:59", "2026-11-22 07:00"),
        (NIGHT, "2026-11-22 07:00", None),
        (WORK, "2026-11-20 12:00", "2026-11-20 18:00"),
        (WORK, "2026-11-21 12:00", None),
        (WORK, "2026-11-23 08:00", "2026-11-23 18:00"),
        # the day is the one on which the hours begin
        (["fri 22:00-07:00"], "2026-11-21 06:00", "2026-11-21 07:00"),
        (["sat 22:00-07:00"], "2026-11-21 06:00", None),
        # over the end of the week
        (["sat-mon 10:00-11:00"], "2026-11-22 10:30", "2026-11-22 11:00"),
        (["sat-mon 10:00-11:00"], "2026-11-24 10:30", None),
        (["sun,fri 10:00-11:00"], "2026-11-20 10:30", "2026-11-20 11:00"),
        # to midnight, and a whole day
        (["20:00-24:00"], "2026-11-21 23:59", "2026-11-22 00:00"),
        (["sat 00:00-24:00"], "2026-11-21 12:00", "2026-11-22 00:00"),
        (["sat 09:00-09:00"], "2026-11-22 08:59", "2026-11-22 09:00"),
        # windows that touch are one
        (["20:00-24:00", "00:00-06:00"], "2026-11-21 21:00", "2026-11-22 06:00"),
        (["sat,sun 00:00-24:00", "mon 00:00-06:00"], "2026-11-21 12:00", "2026-11-23 06:00"),
        (["20:00-23:00", "22:00-01:00"], "2026-11-21 21:00", "2026-11-22 01:00"),
    ],
)
def test_quiet_hours(quiet, now, until):
    found = Schedule(quiet, ZURICH).at(at(now))
    assert (found and found.until) == (until and at(until))


@pytest.mark.parametrize(
    ("quiet", "now", "begins", "text"),
    [
        (NIGHT, "2026-11-21 21:59:59", "2026-11-21 22:00", NIGHT[0]),
        (NIGHT, "2026-11-21 22:00", None, ""),  # they are now
        (NIGHT, "2026-11-22 07:00", "2026-11-22 22:00", NIGHT[0]),
        (WORK, "2026-11-20 19:00", "2026-11-23 08:00", WORK[0]),
        ([*WORK, "sat 23:00-24:00"], "2026-11-20 19:00", "2026-11-21 23:00", "sat 23:00-24:00"),
        ([], "2026-11-20 19:00", None, ""),
        # the night in which the clocks skip it: the one after
        (["02:15-02:45"], "2026-03-29 00:00", "2026-03-30 02:15", "02:15-02:45"),
        # the hour that comes twice is one window
        (["02:15-02:45"], "2026-10-25 00:00", "2026-10-25 02:15", "02:15-02:45"),
    ],
)
def test_what_comes_next(quiet, now, begins, text):
    found = Schedule(quiet, ZURICH).next(at(now))
    assert found == (begins and (at(begins), text))


def test_the_night_in_which_clocks_go_forward_is_an_hour_shorter():
    schedule = Schedule(NIGHT, ZURICH)
    begin = at("2026-03-28 22:00")
    found = schedule.at(begin)
    assert found.until - begin == 8 * 3600
    assert found.until == utc("2026-03-29 05:00")


def test_the_night_in_which_clocks_go_back_is_an_hour_longer():
    found = Schedule(NIGHT, ZURICH).at(begin := at("2026-10-24 22:00"))
    assert found.until - begin == 10 * 3600


def test_an_hour_that_comes_twice_is_quiet_twice():
    schedule = Schedule(["02:15-02:45"], ZURICH)
    for moment in (utc("2026-10-25 00:20"), utc("2026-10-25 00:50"), utc("2026-10-25 01:40")):
        assert schedule.at(moment).until == utc("2026-10-25 01:45")
    assert schedule.at(utc("2026-10-25 01:45")) is None


def test_an_hour_that_is_left_out_is_not_quiet():
    schedule = Schedule(["02:15-02:45"], ZURICH)
    jump = int(utc("2026-03-29 01:00"))
    assert [moment for moment in range(jump - 7200, jump + 7200, 60) if schedule.at(moment)] == []


@pytest.mark.parametrize(
    ("quiet", "begin", "end"),
    [
        ("01:00-02:30", "2026-03-29 00:00", "2026-03-29 01:00"),  # ends where the clocks jump over its end
        ("02:30-04:00", "2026-03-29 01:00", "2026-03-29 02:00"),  # begins there
    ],
)
def test_hours_that_reach_into_the_gap_stop_at_the_jump(quiet, begin, end):
    schedule = Schedule([quiet], ZURICH)
    assert schedule.at(utc(begin) - 1) is None
    assert schedule.at(utc(begin)).until == pytest.approx(utc(end), abs=1)
    assert schedule.at(utc(end) + 1) is None


def test_a_place_decides_when_it_is_night():
    now = utc("2026-11-21 14:00")
    assert Schedule(NIGHT, "Asia/Tokyo").at(now)
    assert Schedule(NIGHT, ZURICH).at(now) is None


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="this system has no tzset")
def test_the_machines_own_zone_is_the_one_of_each_moment(monkeypatch):
    now = utc("2026-11-21 14:00")
    schedule = Schedule(NIGHT)
    try:
        monkeypatch.setitem(os.environ, "TZ", ":Asia/Tokyo")
        assert schedule.at(now).until == utc("2026-11-21 22:00")
        monkeypatch.setitem(os.environ, "TZ", ":Europe/Zurich")
        assert schedule.at(now) is None
        begin = at("2026-03-28 22:00")
        assert schedule.at(begin).until - begin == 8 * 3600
        assert Schedule(["02:30-04:00"]).at(utc("2026-03-29 01:30")).until == utc("2026-03-29 02:00")
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("22-7", "no time span"),
        ("25:00-07:00", "no clock shows: 25:00"),
        ("22:60-07:00", "no clock shows: 22:60"),
        ("24:30-07:00", "24:30"),
        ("24:00-07:00", "begins at 24:00"),
        ("day 22:00-07:00", "none of mon, tue"),
        ("mon- tue 22:00-07:00", "no time span"),
    ],
)
def test_what_cannot_be_understood_is_named(text, part):
    with pytest.raises(ValueError, match=part):
        parse(text)


def test_an_unknown_time_zone_is_a_value():
    found = schedule_reader(NIGHT, "Mars/Olympus")
    assert isinstance(found, Unknown)
    assert "Mars/Olympus" in found.reason
    assert isinstance(schedule_reader(NIGHT, "../../etc/passwd"), Unknown)
    assert isinstance(schedule_reader(NIGHT, ZURICH), Schedule)
