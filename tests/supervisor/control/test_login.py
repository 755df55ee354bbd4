"""Codes and sessions: once, for a while, a bounded number; and the route that hands codes out."""

from __future__ import annotations

import json
import stat

import pytest

from supervisor.control import login
from supervisor.control.exchange import Request
from supervisor.control.login import CODE_S, MOST_CODES, MOST_SESSIONS, SESSION_IDLE_S, Logins
from supervisor.control.routes import answer


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def logins(clock) -> Logins:
    return Logins(clock)


def session(logins: Logins) -> str:
    token = logins.swap(logins.new_code())
    assert token is not None
    return token


def test_a_code_opens_one_session(logins):
    code = logins.new_code()
    token = logins.swap(code)
    assert token
    assert logins.admits(token)
    assert logins.swap(code) is None


def test_codes_and_tokens_are_not_each_other(logins):
    code = logins.new_code()
    assert not logins.admits(code)
    assert logins.swap(session(logins)) is None


def test_no_two_are_alike_and_all_are_long(logins):
    made = {logins.new_code() for _ in range(100)} | {session(logins) for _ in range(100)}
    assert len(made) == 200
    assert min(map(len, made)) >= 43  # 256 bits


@pytest.mark.parametrize(("after_s", "good"), [(0.0, True), (CODE_S - 0.01, True), (CODE_S, False), (1e9, False)])
def test_a_code_is_good_for_a_minute(logins, clock, after_s, good):
    code = logins.new_code()
    clock.now += after_s
    assert (logins.swap(code) is not None) is good


def test_a_session_ends_when_it_is_idle_too_long_and_not_before(logins, clock):
    token = session(logins)
    for _ in range(5):
        clock.now += SESSION_IDLE_S - 1
        assert logins.admits(token)
    clock.now += SESSION_IDLE_S
    assert not logins.admits(token)


def test_the_oldest_code_gives_way(logins, clock):
    codes = []
    for _ in range(MOST_CODES + 1):
        codes.append(logins.new_code())
        clock.now += 0.1
    assert logins.swap(codes[0]) is None
    assert all(logins.swap(code) for code in codes[1:])


def test_the_session_that_was_idle_longest_gives_way(logins, clock):
    tokens = []
    for _ in range(MOST_SESSIONS):
        tokens.append(session(logins))
        clock.now += 1
    assert logins.admits(tokens[0])  # so the second is the one
    tokens.append(session(logins))
    assert [logins.admits(token) for token in tokens].count(False) == 1
    assert not logins.admits(tokens[1])


def test_an_ended_session_is_ended_and_others_go_on(logins):
    one, other = session(logins), session(logins)
    logins.end(one)
    logins.end("nobody's")
    assert not logins.admits(one)
    assert logins.admits(other)


@pytest.mark.parametrize("wrong", ["", " ", "\x00", "\ud800", "ä" * 50, "x" * 100_000])
def test_what_is_no_code_and_no_token_is_refused(logins, wrong):
    session(logins)
    logins.new_code()
    assert logins.swap(wrong) is None
    assert not logins.admits(wrong)


def test_every_secret_is_compared_each_time_and_in_constant_time(logins, monkeypatch):
    tokens = [session(logins) for _ in range(5)]
    compared: list[bytes] = []
    real = login.hmac.compare_digest
    monkeypatch.setattr(login.hmac, "compare_digest", lambda one, other: compared.append(one) or real(one, other))
    assert logins.admits(tokens[0])
    assert compared[:5] == [token.encode() for token in tokens]
    compared.clear()
    logins.swap("x" * 43)
    assert compared == []  # no code was handed out
    codes = [logins.new_code() for _ in range(3)]
    assert logins.swap(codes[0])
    assert len(compared) == 3


def test_the_clock_goes_on_while_the_machine_sleeps_where_there_is_such_a_clock():
    assert login._always() > 0
    assert login._always() <= login._always()


# ---- the token file


def test_a_program_has_its_token_from_a_file_that_is_its_owners(logins, clock, tmp_path):
    path = tmp_path / "page.json"
    path.write_text("of an earlier life")
    path.chmod(0o644)
    logins.url = "http://127.0.0.1:1"
    with logins.token_file(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        told = json.loads(path.read_text())
        assert told["url"] == "http://127.0.0.1:1"
        clock.now += 2 * SESSION_IDLE_S
        assert logins.admits(told["token"])
    assert not path.exists()
    assert not logins.admits(told["token"])


def test_a_link_in_place_of_the_file_is_replaced_and_not_followed(logins, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("x")
    path = tmp_path / "page.json"
    path.symlink_to(precious)
    with logins.token_file(path):
        assert not path.is_symlink()
    assert precious.read_text() == "x"


# ---- the route


async def test_the_route_names_the_page_with_a_code_behind_the_hash(box, logins):
    logins.url = "http://127.0.0.1:4711"
    surface = box.surface._replace(logins=logins)
    response = await answer(Request("POST", "/v1/login-code", b"{}", "application/json"), surface)
    assert response.status == 200
    told = json.loads(response.body)
    assert told["expires_s"] == CODE_S
    base, _, code = told["url"].partition("/#c=")
    assert base == "http://127.0.0.1:4711"
    assert logins.swap(code)


@pytest.mark.parametrize("there", [True, False])
async def test_without_a_page_the_route_says_how_to_get_one(box, logins, there):
    surface = box.surface._replace(logins=logins if there else None)
    response = await answer(Request("POST", "/v1/login-code"), surface)
    assert response.status == 409
    assert "[page]" in json.loads(response.body)["error"]["message"]


async def test_a_body_with_anything_in_it_is_refused(box, logins):
    logins.url = "http://127.0.0.1:4711"
    surface = box.surface._replace(logins=logins)
    response = await answer(Request("POST", "/v1/login-code", b'{"for": 1}', "application/json"), surface)
    assert response.status == 400
