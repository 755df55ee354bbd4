"""Command line of the makers: `scripts/make-fixtures OUT_DIR [NAME …]`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

# Each maker imports its library when it is called: one of them can be made where only that library is installed.


def _image(out: Path) -> None:
    from make_fixtures.diffusion import write_tiny_sd

    write_tiny_sd(out / "tiny-sd-onnx")


def _image_half(out: Path) -> None:
    from make_fixtures.diffusion import write_tiny_sd

    write_tiny_sd(out / "tiny-sd-half", half=True)


def _image_hang(out: Path) -> None:
    from make_fixtures.diffusion import write_tiny_sd

    write_tiny_sd(out / "tiny-sd-hang", hang=True)


def _hang(out: Path) -> None:
    from make_fixtures.hang import write_hang

    write_hang(out / "hang.onnx")


def _voices(out: Path) -> None:
    from make_fixtures.voices import ESPEAK_PHONEMES, TEXT_PHONEMES, write_voice

    write_voice(out / "tone-text.onnx", TEXT_PHONEMES, "text")
    write_voice(out / "tone-espeak.onnx", ESPEAK_PHONEMES, "espeak")


def _embedding(out: Path) -> None:
    from make_fixtures.embedding import write_embedder

    write_embedder(out / "tiny-embed-onnx")


def _llama(out: Path) -> None:
    from make_fixtures.llama import write_llama

    write_llama(out / "random-q8_0.gguf")


def _llama_broken(out: Path) -> None:
    from make_fixtures.llama import write_broken

    write_broken(out / "broken-gguf")


def _whisper(out: Path) -> None:
    from make_fixtures.whisper import write_random_whisper

    write_random_whisper(out / "whisper-random")


MAKERS: dict[str, Callable[[Path], None]] = {
    "image": _image,
    "image-half": _image_half,
    "image-hang": _image_hang,
    "hang": _hang,
    "voices": _voices,
    "embedding": _embedding,
    "llama": _llama,
    "llama-broken": _llama_broken,
    "whisper": _whisper,
}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="scripts/make-fixtures", description="Make the fixture models again.")
    parser.add_argument("out", type=Path, help="folder to write into")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one or more of {', '.join(MAKERS)}; all by default")
    asked = parser.parse_args()
    if unknown := [name for name in asked.names if name not in MAKERS]:
        parser.error(f"no maker is named {unknown[0]!r}; known are {', '.join(MAKERS)}")
    asked.out.mkdir(parents=True, exist_ok=True)
    for name in asked.names or MAKERS:
        MAKERS[name](asked.out)
        print(f"made {name}")


if __name__ == "__main__":
    main()
