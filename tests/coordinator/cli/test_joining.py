"""The line that lets a worker join is one that `supervisor enrol` takes."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from coordinator.cli.joining import join_address, join_line
from coordinator.cli.main import BAD_CONFIG, main
from coordinator.config import Config
from coordinator.server import Refusal
from supervisor.cli import main as supervisor
from supervisor.enrolment import addresses


@pytest.mark.parametrize(
    ("settings", "address"),
    [
        ({}, "http://127.0.0.1:8080"),
        ({"listen": "[::1]:9000"}, "http://[::1]:9000"),
        ({"listen": "0.0.0.0:8443", "tls_cert": "c.pem"}, "https://gpu.example.org:8443"),
        ({"listen": "[::]:8443", "tls_cert": "c.pem"}, "https://gpu.example.org:8443"),
        ({"listen": "10.0.0.5:8443", "tls_cert": "c.pem"}, "https://10.0.0.5:8443"),
        ({"listen": "coordinator.lan:8443", "tls_cert": "c.pem"}, "https://coordinator.lan:8443"),
        ({"listen": "0.0.0.0:8080", "behind_proxy": ["10.0.0.1"]}, "https://THIS-COORDINATOR"),
        ({"listen": "127.0.0.1:0"}, "https://THIS-COORDINATOR"),
    ],
)
def test_the_address_is_where_it_listens_as_far_as_can_be_told(settings: dict[str, Any], address: str) -> None:
    found, hint = join_address(Config(**settings), hostname=lambda: "gpu.example.org")
    assert shlex.split(join_line(found, "bhe_x")) == ["supervisor", "enrol", address, "bhe_x"]
    assert "--url" in hint
    assert addresses(address)[0].startswith(address)


def test_an_address_that_the_admin_knows_is_taken_as_it_is() -> None:
    address, hint = join_address(Config(), "https://gpu.example.org/here/")
    assert (join_line(address, "bhe_x"), hint) == ("supervisor enrol https://gpu.example.org/here bhe_x", "")
    odd, _hint = join_address(Config(), "https://h/$(true)")
    assert shlex.split(join_line(odd, "bhe_x"))[2] == "https://h/$(true)"


@pytest.mark.parametrize(
    "url", ["gpu.example.org", "ftp://h", "https://", "https://u@h", "https://h:x", "https://h/ a"]
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(Refusal, match="--url: expected https://HOST"):
        join_address(Config(), url)


def test_the_token_alone_is_on_standard_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["workers", "enrol", "--state", str(tmp_path)]
    assert main([*words, "--url", "https://gpu.example.org"]) == 0
    said = capsys.readouterr()
    (token,) = said.out.split()
    assert token.startswith("bhe_")
    assert "supervisor enrol https://gpu.example.org TOKEN" in said.err.splitlines()
    assert token not in said.err  # the log of a build keeps what is said there
    assert main([*words, "--url", "nowhere"]) == BAD_CONFIG
    assert main(["workers", "tokens", "--json", "--state", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count('"prefix"') == 1  # a wrong address makes no token


def test_at_a_terminal_the_line_has_the_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["workers", "enrol", "--state", str(tmp_path), "--url", "https://gpu.example.org"]) == 0
    said = capsys.readouterr()
    assert f"supervisor enrol https://gpu.example.org {said.out.strip()}" in said.err.splitlines()


def test_the_supervisor_has_that_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        supervisor([*shlex.split(join_line(join_address(Config())[0], "bhe_x"))[1:], "--help"])
    assert ended.value.code == 0
    assert "URL" in capsys.readouterr().out
