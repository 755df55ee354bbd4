"""Looking up repositories on the stand-in hub with the real huggingface-hub, and choosing files."""

from __future__ import annotations

import hashlib

import pytest

from supervisor.pull_fetch import FetchFailed, Remote
from supervisor.pull_hub import Found, HubFile, choose, look_up

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(site, monkeypatch):
    """huggingface-hub reads its endpoint at import: the constant is replaced, as HF_ENDPOINT would in a child."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "ENDPOINT", site.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    site.repos["owner/repo"] = {"README.md": b"#", "model-Q4_K_M.gguf": b"GGUFq4", "model-Q8_0.gguf": b"GGUFq8"}
    return site


def asked(found: Found) -> dict[str, Remote]:
    return found.files


def test_a_file_is_found_by_a_part_of_its_name(hub):
    found = look_up("owner/repo", "q4_k_m")
    assert found.origin == f"owner/repo@{COMMIT}"
    (remote,) = found.files.values()
    assert list(found.files) == ["model-Q4_K_M.gguf"]
    assert remote.url.endswith(f"/owner/repo/resolve/{COMMIT}/model-Q4_K_M.gguf")
    assert remote.sha256 == hashlib.sha256(b"GGUFq4").hexdigest()
    assert remote.size_bytes == 6


def test_several_models_want_a_choice(hub):
    with pytest.raises(FetchFailed, match=r"--file: model-Q4_K_M.gguf, model-Q8_0.gguf"):
        look_up("owner/repo", "")


def test_an_unknown_repository_says_how_to_reach_a_private_one(hub):
    with pytest.raises(FetchFailed, match=r"no public repository owner/none.*HF_TOKEN"):
        look_up("owner/none", "")


def test_a_gated_repository_says_how_to_get_in(hub):
    hub.gated.add("owner/repo")
    with pytest.raises(FetchFailed, match="gated: accept its terms"):
        look_up("owner/repo", "Q4")


def test_a_token_is_sent_and_kept_for_the_download(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.gated.add("owner/repo")
    (remote,) = look_up("owner/repo", "Q8").files.values()
    assert {name.lower(): value for name, value in remote.headers.items()} == {"authorization": "Bearer hf_secret"}


def test_an_unknown_revision_is_told(hub):
    with pytest.raises(FetchFailed, match="no such revision"):
        look_up("owner/repo@nonesuch", "Q8")


def test_an_unreachable_hub_is_told(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FetchFailed, match="cannot be reached"):
        look_up("owner/repo", "Q8")


def test_a_plain_http_hub_elsewhere_is_refused(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://hub.example")
    with pytest.raises(FetchFailed, match="expected an https address"):
        look_up("owner/repo", "Q8")


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a\\b"])
def test_names_that_would_leave_the_folder_are_refused(hub, name: str):
    hub.repos["owner/evil"] = {name: b"x", "m.gguf": b"GGUF"}
    with pytest.raises(FetchFailed, match="impossible name"):
        look_up("owner/evil", "m.gguf")


# ---- choosing ----------------------------------------------------------------------------------------------


def chosen(names: list[str], pattern: str = "") -> list[str]:
    return [file.name for file in choose([HubFile(name=name, size_bytes=1) for name in names], pattern, "o/r")]


def test_one_gguf_is_the_model():
    assert chosen(["README.md", "config.json", "m.gguf"]) == ["m.gguf"]


def test_a_projector_is_no_second_model():
    assert chosen(["m.gguf", "mmproj-m.gguf"]) == ["m.gguf"]


def test_all_parts_of_a_split_gguf_come():
    parts = [f"q/m-0000{n}-of-00002.gguf" for n in (1, 2)]
    assert chosen([*parts, "x.txt"]) == parts
    assert chosen([*parts, "other.gguf"], "q/m-00001-of-00002.gguf") == parts
    with pytest.raises(FetchFailed, match=r"lacks q/m-00002-of-00002\.gguf"):
        chosen(parts[:1])


def test_a_voice_comes_with_its_json():
    assert chosen(["a/x.onnx", "a/x.onnx.json", "b/y.onnx", "b/y.onnx.json"], "a/x.onnx") == [
        "a/x.onnx",
        "a/x.onnx.json",
    ]


def test_a_layout_comes_whole_without_other_frameworks():
    names = ["model_index.json", "unet/model.onnx", "unet/model.safetensors", "README.md", "x.png", "openvino/m.xml"]
    assert chosen(names) == ["model_index.json", "unet/model.onnx"]


def test_ctranslate2_keeps_its_bin():
    names = ["model.bin", "vocabulary.txt", "config.json", ".gitattributes"]
    assert chosen(names) == ["model.bin", "vocabulary.txt", "config.json"]


@pytest.mark.parametrize(("pattern", "said"), [("nope", "has no file 'nope'"), ("*.gguf", "several models")])
def test_a_pattern_must_fit_one(pattern: str, said: str):
    with pytest.raises(FetchFailed, match=said):
        chosen(["a.gguf", "b.gguf"], pattern)


def test_nothing_to_pull_is_told():
    with pytest.raises(FetchFailed, match="holds no model file"):
        chosen(["README.md"])
