"""What must lie in a model's folder, checked before the native code sees it."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
from pathlib import Path
from typing import Any

from protocol.faults import refuse

_NEEDED = ("model.bin", "config.json", "tokenizer.json")
_VOCABULARIES = ("vocabulary.json", "vocabulary.txt")


def check(place: Path) -> Path:
    """Return the model's folder; `place` may also be the model.bin in it.

    Without tokenizer.json the library would fetch one from the network.

    Raises:
        FaultError: `load_failed`, naming the file that is missing.
    """
    folder = place.parent if place.name == "model.bin" else place
    if not folder.is_dir():
        raise refuse("load_failed", f"{place} is not the folder of a CTranslate2 Whisper model.", "files.model")
    for name in _NEEDED:
        if not (folder / name).is_file():
            raise refuse("load_failed", f"{folder / name} is missing.", "files.model")
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise refuse("load_failed", f"{folder / _VOCABULARIES[0]} is missing.", "files.model")
    return folder


def vocabulary_size(folder: Path) -> int:
    """How many rows the embedding has: token ids must lie below. Raises FaultError (`load_failed`)."""
    listed = folder / _VOCABULARIES[0]
    if not listed.is_file():
        with (folder / _VOCABULARIES[1]).open("rb") as lines:
            return sum(1 for _ in lines)
    try:
        words = json.loads(listed.read_bytes())
    except ValueError as error:
        raise refuse("load_failed", f"{listed} is not JSON: {error}.", "files.model") from None
    if not isinstance(words, list):
        raise refuse("load_failed", f"{listed} is not a list of tokens.", "files.model")
    return len(words)


def check_tokenizer(tokenizer: Any, vocabulary: int) -> range:
    """Refuse a tokenizer of another model: an id beyond the embedding would crash the process.

    Returns:
        The ids of the control tokens, which lie between the text and the timestamps.

    Raises:
        FaultError: `load_failed`.
    """
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= vocabulary:
        what = f"tokenizer.json knows token {highest}, but the model's vocabulary ends at {vocabulary - 1}"
        raise refuse("load_failed", f"{what}: they are not of one model.", "files.model")
    for token in ("<|startoftranscript|>", "<|endoftext|>", "<|startofprev|>", "<|notimestamps|>"):
        if tokenizer.token_to_id(token) is None:
            raise refuse("load_failed", f"tokenizer.json has no {token}: it is not of a Whisper model.", "files.model")
    return range(tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<|notimestamps|>") + 1)


def preload_cublas() -> None:
    """Load cuBLAS from the `nvidia` wheels of this interpreter, if they are there.

    CTranslate2 opens libcublas.so.12 by its bare name and finds it when it is already in the process. What is
    not found here may still be installed for the whole system; the warm-up tells.
    """
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        for name in ("libcublasLt.so.12", "libcublas.so.12"):
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(Path(root) / "cublas" / "lib" / name), mode=ctypes.RTLD_GLOBAL)
