"""Prompts to token ids for CLIP-style text encoders: fixed length, padded, never truncated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engines.diffusion.layout import read_json
from protocol.faults import FaultError, refuse

_CLIP_TOKENS = 77  # positions of CLIP's text encoder
_UNSET = 100_000  # transformers writes 10**30 for "no length given"
_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # CLIP's pre-tokenizer


class PromptTokens:
    """Turns prompts into exactly `length` ids: begin, text, end, padding.

    Attributes:
        length: positions of the text encoder, begin and end included.
    """

    def __init__(self, folder: Path, length: int | None = None) -> None:
        """Open the tokenizer.

        Args:
            folder: holds tokenizer.json, or vocab.json and merges.txt; and tokenizer_config.json where there is one.
            length: fixed sequence length of the text encoder, where its graph says so.

        Raises:
            FaultError: `load_failed`, naming the file.
            ImportError: tokenizers is not installed.
        """
        config_path = folder / "tokenizer_config.json"
        config = read_json(config_path) if config_path.is_file() else {}
        self._inner = _open(folder)
        self._bos = self._special(config, "bos_token", _BOS)
        self._eos = self._special(config, "eos_token", _EOS)
        self._pad = self._special(config, "pad_token", _EOS)
        stated: Any = config.get("model_max_length")
        usable = isinstance(stated, int) and 2 < stated < _UNSET
        self.length: int = length or (stated if usable else _CLIP_TOKENS)

    def ids(self, text: str, field: str) -> list[int]:
        """Token ids of one prompt.

        Raises:
            FaultError: `context_length_exceeded`, naming `field`.
        """
        found: list[int] = self._inner.encode(text, add_special_tokens=False).ids
        if len(found) + 2 > self.length:
            raise refuse(
                "context_length_exceeded",
                f"{field}: {len(found)} tokens, but the text encoder takes {self.length - 2}; shorten the text.",
                field,
                tokens=len(found),
                limit=self.length - 2,
            )
        padding = [self._pad] * (self.length - 2 - len(found))
        return [self._bos, *found, self._eos, *padding]

    def _special(self, config: dict[str, Any], name: str, default: str) -> int:
        value = config.get(name) or default
        word = value.get("content", default) if isinstance(value, dict) else str(value)
        number: int | None = self._inner.token_to_id(word)
        if number is None:
            raise refuse("load_failed", f"The tokenizer has no token {word!r} ({name}).", "files.model")
        return number


def _open(folder: Path) -> Any:
    """A `tokenizers.Tokenizer` without truncation or padding of its own."""
    import tokenizers

    whole, vocabulary, merges = folder / "tokenizer.json", folder / "vocab.json", folder / "merges.txt"
    try:
        if whole.is_file():
            found = tokenizers.Tokenizer.from_file(str(whole))
        elif vocabulary.is_file() and merges.is_file():
            found = _clip_bpe(tokenizers, vocabulary, merges)
        else:
            raise refuse(
                "load_failed", f"{folder} holds neither tokenizer.json nor vocab.json with merges.txt.", "files.model"
            )
    except FaultError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        text = " ".join(str(error).split())[:300]
        raise refuse("load_failed", f"The tokenizer in {folder} cannot be read: {text}.", "files.model") from error
    found.no_truncation()
    found.no_padding()
    return found


def _clip_bpe(tokenizers: Any, vocabulary: Path, merges: Path) -> Any:
    """CLIP's tokenizer from its two files, as transformers' CLIPTokenizerFast builds it."""
    n, p = tokenizers.normalizers, tokenizers.pre_tokenizers
    found = tokenizers.Tokenizer(
        tokenizers.models.BPE.from_file(str(vocabulary), str(merges), unk_token=_EOS, end_of_word_suffix="</w>")
    )
    found.normalizer = n.Sequence([n.NFC(), n.Replace(tokenizers.Regex(r"\s+"), " "), n.Lowercase()])
    found.pre_tokenizer = p.Sequence(
        [
            p.Split(tokenizers.Regex(_WORDS), behavior="removed", invert=True),
            p.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    found.add_special_tokens([_BOS, _EOS])
    return found
