"""Where a secret is looked for, and which places are refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from supervisor import secrets
from supervisor.config import load
from supervisor.errors import ConfigError
from supervisor.secrets import MAX_BYTES, TOKEN, has_secret, judge_file, secret


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(" from-file\n")
    path.chmod(0o600)
    return path


def credentials(tmp_path: Path, text: str) -> dict[str, str]:
    folder = tmp_path / "credentials"
    folder.mkdir()
    (folder / TOKEN).write_text(text)
    (folder / TOKEN).chmod(0o440)  # as systemd leaves it: an ACL whose mask shows as the group's permissions
    return {"CREDENTIALS_DIRECTORY": str(folder)}


def test_the_order(tmp_path, file):
    credential = credentials(tmp_path, "from-credential\n")
    variable = {"BULKHEAD_TOKEN": " from-variable "}
    assert secret(TOKEN, str(file), {**credential, **variable}) == "from-credential"
    assert secret(TOKEN, str(file), variable) == "from-file"
    assert secret(TOKEN, "", variable) == "from-variable"
    assert secret(TOKEN, "", {**variable, "CREDENTIALS_DIRECTORY": str(tmp_path)}) == "from-variable"


def test_a_refused_place_does_not_lead_to_a_weaker_one(tmp_path, file):
    file.chmod(0o640)
    with pytest.raises(ConfigError, match="run: chmod 600"):
        secret(TOKEN, str(file), {"BULKHEAD_TOKEN": "x"})
    with pytest.raises(ConfigError, match="the credential coordinator-token is empty"):
        secret(TOKEN, "", {**credentials(tmp_path, "\n"), "BULKHEAD_TOKEN": "x"})


def test_no_place_has_it():
    with pytest.raises(ConfigError, match=r"there is no coordinator-token: .* nor in \$BULKHEAD_TOKEN"):
        secret(TOKEN, "", {"BULKHEAD_TOKEN": " "})
    with pytest.raises(ConfigError, match=r"not in a file of worker.toml\Z"):
        secret("other", "", {})
    assert not has_secret(TOKEN, {})


@pytest.mark.parametrize("mode", [0o604, 0o620, 0o640, 0o666, 0o601])
def test_files_that_others_can_reach(file, mode):
    file.chmod(mode)
    assert judge_file(file) == f"{file} can be read or written by others than its owner; run: chmod 600 {file}"


def test_a_file_of_another_owner(file, monkeypatch):
    owner = file.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert (
        judge_file(file)
        == f"{file} belongs to user {owner}, not to {owner + 1}, who runs this; run: chown {owner + 1} {file}"
    )
    with pytest.raises(ConfigError, match=f"belongs to user {owner}"):
        secret(TOKEN, str(file), {})


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_root_may_look_at_a_users_configuration_but_not_use_the_users_token(file):
    os.chown(file, 12345, 12345)
    assert judge_file(file) == ""
    with pytest.raises(ConfigError, match="belongs to user 12345"):
        secret(TOKEN, str(file), {})


def test_what_is_no_token(tmp_path, file):
    assert "is not a plain file" in judge_file(tmp_path)
    assert judge_file(tmp_path / "gone").endswith("cannot be read: No such file or directory")
    file.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        secret(TOKEN, str(file), {})
    file.write_text("x" * (MAX_BYTES + 1))
    with pytest.raises(ConfigError, match="that is no token"):
        secret(TOKEN, str(file), {})


def test_a_remote_coordinator_is_content_with_any_of_them(tmp_path):
    path = tmp_path / "worker.toml"
    path.write_text('[coordinator]\nurl = "wss://c.example"\n')
    with pytest.raises(ConfigError, match=f"from the systemd credential {TOKEN} or from BULKHEAD_TOKEN"):
        load(path, {})
    assert load(path, {"BULKHEAD_TOKEN": "x"}).coordinator.token_file == ""
    assert load(path, credentials(tmp_path, "x")).coordinator.url == "wss://c.example"


def test_every_name_has_its_own_variable():
    assert len(set(secrets.VARIABLES.values())) == len(secrets.VARIABLES)


@pytest.mark.parametrize("data", [b"tok\0en", b"\xef\xbb\xbftok", b"a\nb", b"a b", "tök".encode(), b"a\x1bb"])
def test_a_token_that_no_header_can_carry(file, data):
    file.write_bytes(data)
    with pytest.raises(ConfigError, match=f"{file} holds white space or characters that no token has"):
        secret(TOKEN, str(file), {})


def test_an_editor_of_windows_wrote_it(file):
    file.write_bytes(b"tok\r\n")
    assert secret(TOKEN, str(file), {}) == "tok"


def test_places_that_are_no_files(tmp_path):
    folder, loop, pipe = tmp_path / "folder", tmp_path / "loop", tmp_path / "pipe"
    folder.mkdir()
    loop.symlink_to(loop)
    os.mkfifo(pipe)
    for path, word in ((folder, "is not a plain file"), (loop, "cannot be read"), (pipe, "is not a plain file")):
        assert word in judge_file(path)
        with pytest.raises(ConfigError, match=word):
            secret(TOKEN, str(path), {})
