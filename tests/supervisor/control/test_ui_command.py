"""`supervisor ui` against a served socket and page."""

from __future__ import annotations

import argparse
import json
import webbrowser

import pytest
import trio

from supervisor.control import ui_command
from supervisor.control.client import NotRunning, RequestFailed
from supervisor.control.login import Logins
from supervisor.control.loopback import open_page
from supervisor.control.server import open_control
from supervisor.settings import PageTable


@pytest.fixture
def config(tmp_path) -> str:
    path = tmp_path / "worker.toml"
    path.write_text('config_version = 1\n[control]\nsocket = "ui.sock"\n')
    return str(path)


@pytest.fixture
async def logins(box, config, tmp_path):
    made = Logins()
    surface = box.surface._replace(logins=made)
    async with open_control(tmp_path / "ui.sock", surface), open_page(PageTable(enabled=True), surface):
        yield made


@pytest.fixture
def browser(monkeypatch) -> list[str]:
    """What a browser was asked to open."""
    opened: list[str] = []
    monkeypatch.setenv("DISPLAY", ":99")
    monkeypatch.setattr(webbrowser, "open", lambda url, new=0: opened.append(url) or True)
    return opened


async def types(config: str, *words: str) -> int:
    parser = argparse.ArgumentParser()
    ui_command.add_arguments(parser)
    arguments = parser.parse_args([*words, "--config", config])
    return await trio.to_thread.run_sync(arguments.command, arguments)


async def test_it_opens_the_page_with_a_code_that_works(config, logins, browser, capsys):
    assert await types(config) == 0
    (url,) = browser
    base, _, code = url.partition("/#c=")
    assert base == logins.url
    assert logins.swap(code)
    said = capsys.readouterr().out
    assert base in said
    assert code not in said


async def test_print_opens_nothing(config, logins, browser, capsys):
    assert await types(config, "--print") == 0
    assert browser == []
    assert logins.swap(capsys.readouterr().out.strip().partition("#c=")[2])


async def test_for_programs_it_opens_nothing(config, logins, browser, capsys):
    assert await types(config, "--json") == 0
    assert browser == []
    assert logins.swap(json.loads(capsys.readouterr().out)["url"].partition("#c=")[2])


async def test_without_a_screen_it_prints(config, logins, browser, capsys, monkeypatch):
    monkeypatch.delenv("DISPLAY")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr(ui_command.sys, "platform", "linux")
    monkeypatch.setattr(ui_command.has_screen, "__defaults__", (ui_command.os.environ, "linux"))
    assert await types(config) == 0
    assert browser == []
    assert logins.url in capsys.readouterr().out


@pytest.mark.parametrize(
    "fails", [lambda _url, new=0: False, lambda _url, new=0: (_ for _ in ()).throw(webbrowser.Error)]
)
async def test_a_browser_that_cannot_be_opened_leaves_the_address(config, logins, browser, capsys, monkeypatch, fails):
    monkeypatch.setattr(webbrowser, "open", fails)
    monkeypatch.setattr(ui_command.has_screen, "__defaults__", ({"DISPLAY": ":99"}, "linux"))
    assert await types(config) == 0
    said = capsys.readouterr().out
    assert "No browser could be opened" in said
    assert logins.swap(said.strip().partition("#c=")[2])


async def test_a_page_that_is_off_says_how_to_switch_it_on(box, config, tmp_path):
    surface = box.surface._replace(logins=Logins())
    async with open_control(tmp_path / "ui.sock", surface), open_page(PageTable(), surface):
        with pytest.raises(RequestFailed, match=r"enabled = true in \[page\]"):
            await types(config)


async def test_no_supervisor_is_said(config):
    with pytest.raises(NotRunning):
        await types(config)


@pytest.mark.parametrize(
    ("environ", "platform", "there"),
    [
        ({}, "linux", False),
        ({"DISPLAY": ":0"}, "linux", True),
        ({"WAYLAND_DISPLAY": "wayland-0"}, "linux", True),
        ({"DISPLAY": ""}, "linux", False),
        ({}, "darwin", True),
        ({"SSH_CONNECTION": "x"}, "darwin", False),
        ({}, "win32", True),
    ],
)
def test_whether_a_browser_would_be_seen(environ, platform, there):
    assert ui_command.has_screen(environ, platform) is there
