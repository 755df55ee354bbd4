"""Secrets are found wherever they lie, and struck out in every spelling."""

from __future__ import annotations

import base64
import json
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.config import load
from supervisor.diagnostics_secrets import SHORTEST, Strike, secret_values

TEXTS = st.text(st.characters(exclude_categories=("Cs",)), min_size=SHORTEST, max_size=40)


@given(TEXTS, st.text(max_size=60), st.text(max_size=60))
def test_whatever_a_secret_is_it_is_gone_in_every_spelling(secret, before, after):
    strike = Strike([secret])
    for spelling in (secret, json.dumps(secret), quote(secret, safe=""), secret.encode().hex(), repr(secret)):
        struck = strike(before + spelling + after)
        assert secret not in struck
        assert json.dumps(secret)[1:-1] not in struck
    assert secret not in strike(base64.b64decode(base64.b64encode(secret.encode())).decode())


@given(st.lists(TEXTS, max_size=5), st.text(max_size=80))
def test_several_secrets_that_overlap_are_all_gone(secrets, noise):
    text = noise.join(secrets) + "".join(secrets)
    struck = Strike(secrets)(text)
    assert not [secret for secret in secrets if secret in struck]


def test_what_is_no_secret_stays():
    assert Strike([])("a text") == "a text"
    assert Strike(["abc"])("abcabc") == "abcabc", "three letters are no secret"
    assert Strike(["swordfish"])("the swordfish is here") == "the [hidden] is here"
    assert Strike(["[hidden]"])("x[hidden]y") == "xy"


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "token").write_text("tok-of-the-worker\n")
    (tmp_path / "token").chmod(0o600)
    (tmp_path / "headers").write_text("Authorization: Bearer otel-secret\nx-plain: second-value\n")
    (tmp_path / "headers").chmod(0o600)
    (tmp_path / "dsn").write_text("https://dsn-key@sentry.example/1")
    (tmp_path / "dsn").chmod(0o600)
    (tmp_path / "worker.toml").write_text(
        """[coordinator]
url = "ws://user:url-password@localhost:1"
token_file = "token"
[otel]
endpoint = "http://localhost:4318"
headers_file = "headers"
[log]
sentry_dsn_file = "dsn"
[engines.synthetic]
env = { API_KEY = "env-secret", PLAIN = "not-hidden" }
[[models]]
name = "synthetic"
engine = "synthetic"
"""
    )
    return load(tmp_path / "worker.toml", {})


def test_secrets_are_found_wherever_they_lie(settings, tmp_path):
    state = tmp_path / "state"
    (state / "coordinator").mkdir(parents=True)
    (state / "coordinator" / "client.key").write_text("bhc_clients\n")
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (credentials / "coordinator-token").write_text("cred-secret")
    (tmp_path / "elsewhere").write_text("in-a-named-file")
    environ = {
        "BULKHEAD_TOKEN": "tok-of-the-variable",
        "HF_TOKEN": "hub-secret",
        "HF_TOKEN_PATH": str(tmp_path / "elsewhere"),
        "HTTPS_PROXY": "http://proxy-user:proxy%20password@proxy:3128",
        "CREDENTIALS_DIRECTORY": str(credentials),
        "PLAIN": "not-hidden",
        "XDG_SESSION_CLASS": "user",
        "MY_KEY": "abc",
    }
    found = secret_values([settings], state, environ)
    assert found >= {
        "tok-of-the-worker",
        "otel-secret",
        "second-value",
        "https://dsn-key@sentry.example/1",
        "env-secret",
        "url-password",
        "bhc_clients",
        "cred-secret",
        "tok-of-the-variable",
        "hub-secret",
        "in-a-named-file",
        "proxy password",
    }
    assert not found & {"not-hidden", "user", "abc", str(tmp_path / "elsewhere"), str(credentials)}


def test_files_that_cannot_be_read_are_left_out(settings, tmp_path):
    (tmp_path / "token").unlink()
    (tmp_path / "dsn").unlink()
    (tmp_path / "dsn").mkdir()
    found = secret_values([settings], tmp_path / "no-state", {"X_TOKEN": "/dev/null", "Y_TOKEN": "/\0"})
    assert "otel-secret" in found
