"""What `[coordinator]` has to say for each dialect."""

from __future__ import annotations

import pytest

from supervisor.config import load
from supervisor.errors import ConfigError
from supervisor.link.dialects import DIALECTS


def loaded(tmp_path, text: str):
    path = tmp_path / "worker.toml"
    path.write_text(f"[coordinator]\n{text}\n[worker]\nstate_dir = 'state'\n")
    return load(path, {}).coordinator


@pytest.mark.parametrize("url", ["https://x.org/studio", "http://127.0.0.1:1", "wss://x.org", "ws://x"])
def test_a_studio_is_an_address_and_needs_no_token(tmp_path, url):
    table = loaded(tmp_path, f'dialect = "studio"\nurl = "{url}"\n[coordinator.studio]\nvram_gb = 12')
    assert (table.url, table.dialect, table.studio.vram_gb) == (url, "studio", 12)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('dialect = "studio"', '"embedded" speaks no studio: give the https://'),
        ('dialect = "studio"\nurl = "ftp://x"', '"ftp://x" is not the https:// or wss://'),
        ('url = "https://x"', '"https://x" is neither "embedded" nor the ws:// or wss:// address'),
        ('url = "wss://x"', "token_file: is missing"),
        ('dialect = "klingon"', "dialect"),
        ('dialect = "studio"\nurl = "https://x"\n[coordinator.studio]\nvram = 1', "vram"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, sentence):
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, text)
    assert sentence in str(caught.value)


def test_what_needs_a_token_says_the_same_in_both_places():
    from supervisor import config

    assert {name: way.token for name, way in config._WAYS.items()} == {
        name: dialect.features.token for name, dialect in DIALECTS.items()
    }
