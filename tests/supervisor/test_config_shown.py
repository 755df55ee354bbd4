"""The configuration as the control API shows it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from supervisor.config_edit import StaleEdit, patch
from supervisor.config_shown import shown
from supervisor.errors import ConfigError

TEXT = '[limits]\nstall_s = 60\n[engines.llm.env]\nHF_TOKEN = "hf_x"\n'
TEXT += '[[models]]\nname = "a.b"\nengine = "llm"\npath = "gone"\n'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "worker.toml"
    path.write_text(TEXT)
    return path


def test_values_places_and_no_secrets(path):
    told, etag = shown(path, {"BULKHEAD__LOG__LEVEL": "debug"})
    rows = {row["key"]: row for row in told["origins"]}
    assert rows["limits.stall_s"] == {
        "key": "limits.stall_s", "value": 60.0, "source": "file", "place": f"{path}:2", "apply": "live",
    }  # fmt: skip
    assert rows["log.level"]["place"] == "BULKHEAD__LOG__LEVEL"
    assert rows["worker.name"] == {"key": "worker.name", "value": "", "source": "default", "apply": "restart"}
    assert rows['models."a.b".engine']["place"] == f"{path}:7"
    assert "hf_x" not in msgspec.json.encode(told).decode()
    assert told["settings"]["engines"]["llm"]["env"] == {"HF_TOKEN": "****"}
    assert (told["files"], len(told["notes"])) == ([str(path)], 1)
    assert len(etag) == 64


def test_the_etag_is_what_an_edit_wants(path):
    _, etag = shown(path, {})
    assert patch(path, {'models."a.b".stall_s': 9}, etag) == shown(path, {})[1] != etag
    with pytest.raises(StaleEdit):
        patch(path, {"log.level": "debug"}, etag)


def test_a_mistake_shows_nothing(path):
    path.write_text("[log]\nlevel = 1\n")
    with pytest.raises(ConfigError, match=r"log\.level"):
        shown(path, {})
