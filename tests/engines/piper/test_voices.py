"""Opening a voice: what is wrong with it is said by name; its speakers are known by name."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("piper", reason="piper-tts is not installed (extra tts)")

from engines.piper import voices
from protocol.engine_wire import Model
from protocol.faults import FaultError
from tests.engines.piper.conftest import ESPEAK, TEXT

pytestmark = pytest.mark.engine


def model(path: Path = TEXT, device: str = "cpu", **options: Any) -> Model:
    return Model(name="voice", files={"model": str(path)}, device=device, options=options)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    path = Path(shutil.copy(TEXT, tmp_path))
    shutil.copy(f"{TEXT}.json", tmp_path)
    return path


def load(given: Model):
    return voices.open_voice(given, Path(given.files["model"]), 1)


def faulted(given: Model):
    with pytest.raises(FaultError) as caught:
        load(given)
    assert caught.value.fault.code == "load_failed"
    return caught.value.fault


def test_names_of_a_voice_with_one_speaker():
    names = voices.names(load(model()), model(), {"alloy": "default"})
    assert names.known == {"default": 0, "voice": 0, "tone-text": 0, "alloy": 0}
    assert names.language == "en_US"


def test_names_of_many_speakers(duo):
    names = voices.names(load(model(duo)), model(duo), {"alloy": "high", "echo": 0})
    assert names.known == {
        "default": 0,
        "voice": 0,
        "duo": 0,
        "0": 0,
        "1": 1,
        "low": 0,
        "high": 1,
        "alloy": 1,
        "echo": 0,
    }


def test_an_alias_for_nobody_is_a_load_fault():
    with pytest.raises(FaultError, match=r"no voice 'nobody'"):
        voices.names(load(model()), model(), {"alloy": "nobody"})


def test_an_unknown_voice_is_refused_with_the_known_ones():
    names = voices.Names(known={f"v{number}": number for number in range(40)})
    assert names.speaker("v7") == 7
    with pytest.raises(FaultError, match=r"no voice 'x'; known: v0, v1, .* and 10 more") as caught:
        names.speaker("x")
    assert (caught.value.fault.code, caught.value.fault.field) == ("invalid_parameter", "voice")


@pytest.mark.parametrize("language", [None, "en", "en-GB", "EN_us"])
def test_languages_that_are_taken(language):
    voices.Names(language="en_US").check_language(language)


def test_another_language_is_refused():
    with pytest.raises(FaultError, match="speaks en_US, not 'de'"):
        voices.Names(language="en_US").check_language("de")
    voices.Names().check_language("de")  # a config that names no language refuses none


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "JSONDecodeError"),
        ("{", "JSONDecodeError"),
        ("[]", "is not the config"),
        ("{}", "KeyError"),
        ('{"audio": 1, "num_symbols": 1, "num_speakers": 1}', "TypeError"),
    ],
)
def test_a_broken_config_is_named(copy, text, reason):
    Path(f"{copy}.json").write_text(text)
    fault = faulted(model(copy))
    assert fault.field == "files.config"
    assert reason in fault.message
    assert str(copy) in fault.message


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"phoneme_type": "pinyin"}, "'pinyin' are not supported"),
        ({"phoneme_type": "runes"}, "ValueError"),
        ({"phoneme_id_map": {"_": [0], "^": [1]}}, "no '\\$'"),
    ],
)
def test_a_config_of_another_kind_is_named(copy, change, reason):
    import re

    path = Path(f"{copy}.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    fault = faulted(model(copy))
    assert fault.field == "files.config"
    assert re.search(reason, fault.message)


def test_a_missing_config_is_named(copy):
    Path(f"{copy}.json").unlink()
    assert faulted(model(copy)).field == "files.config"
    elsewhere = Model(name="voice", files={"model": str(copy), "config": f"{TEXT}.json"}, device="cpu")
    assert load(elsewhere).config.sample_rate == 22_050


@pytest.mark.parametrize("data", [b"", b"not a model", TEXT.read_bytes()[:1500]])
def test_a_damaged_model_is_named(copy, data):
    copy.write_bytes(data)
    fault = faulted(model(copy))
    assert fault.field == "files.model"
    assert str(copy) in fault.message


@pytest.mark.parametrize("name", ["phontab", "phondata", "phonindex", "intonations"])
@pytest.mark.parametrize("empty", [False, True])
def test_incomplete_espeak_data_is_a_load_fault(tmp_path, name, empty):
    """Without this check the process ends with exit(1) or SIGSEGV at the first request."""
    for other in ("phontab", "phondata", "phonindex", "intonations"):
        (tmp_path / other).write_bytes(b"data")
    (tmp_path / name).unlink()
    if empty:
        (tmp_path / name).touch()
    fault = faulted(model(ESPEAK, espeak_data=str(tmp_path)))
    assert fault.field == "options.espeak_data"
    assert f"{tmp_path / name} is missing or empty" in fault.message
    assert "piper-tts" in fault.detail["hint"]


def test_text_voices_need_no_espeak(tmp_path):
    assert load(model(espeak_data=str(tmp_path)))


def test_the_device_is_what_the_session_says():
    from engines.runtime import ort

    device = load(model(device="cuda")).session.device
    assert device.startswith("cuda") if "cuda" in ort.claimed_devices() else device == "cpu"


@pytest.fixture
def little_memory():
    """Let this process map 4 GiB more and no further, whatever the machine overcommits."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    mapped = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 4 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.usefixtures("little_memory")
def test_a_piece_beyond_memory_is_a_typed_fault():
    voice = load(model())
    with pytest.raises(FaultError) as caught:
        voices.speak(voice, [5] * 200_000, 0, 1.0)
    assert caught.value.fault.code == "out_of_memory"
