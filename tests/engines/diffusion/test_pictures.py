"""Pictures out, and hostile picture files in."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from protocol import work
from protocol.faults import FaultError

np = pytest.importorskip("numpy", reason="the image extra is not installed")
Image = pytest.importorskip("PIL.Image", reason="the image extra is not installed")
pictures = pytest.importorskip("engines.diffusion.pictures")

pytestmark = pytest.mark.engine


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *between: bytes) -> bytes:
    """A PNG that claims a size and holds one byte of pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0"))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(between) + pixels + chunk(b"IEND", b"")


def saved(
    format: str, colour: Any = (0, 0, 255), size: tuple[int, int] = (30, 20), mode: str = "RGB", **more: Any
) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, format, **more)
    return buffer.getvalue()


@pytest.mark.parametrize("format", list(work.IMAGE_MIME))
def test_pixels_survive_every_format(format: str) -> None:
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:, 12:] = (250, 10, 20)
    with Image.open(io.BytesIO(pictures.encode(pixels, format, 95))) as image:
        assert (image.format, image.size) == (format.upper(), (24, 16))
        found = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(found[8, 20] - (250, 10, 20)).max() <= (0 if format == "png" else 24)


def test_quality_changes_the_size() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    for format in ("webp", "jpeg"):
        assert len(pictures.encode(pixels, format, 10)) < len(pictures.encode(pixels, format, 95)) / 2


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_content_decides_not_the_name(tmp_path: Path, format: str) -> None:
    path = tmp_path / "picture.txt"
    path.write_bytes(saved(format))
    found = pictures.open_start(path, 16, 8)
    assert found.shape == (8, 16, 3)
    assert np.abs(found[4, 8].astype(int) - (0, 0, 255)).max() <= 8


def test_transparency_becomes_black(tmp_path: Path) -> None:
    path = tmp_path / "p"
    path.write_bytes(saved("PNG", (255, 255, 255, 0), mode="RGBA"))
    assert pictures.open_start(path, 8, 8).max() == 0


def test_exif_turns_the_picture_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    image.paste((0, 0, 255), (20, 0, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: the left half goes up
    image.save(tmp_path / "p", "JPEG", exif=exif, quality=95)
    found = pictures.open_start(tmp_path / "p", 16, 32).astype(int)
    assert found[4, 8, 0] > 200
    assert found[28, 8, 2] > 200


def test_the_middle_is_kept_when_the_shape_differs(tmp_path: Path) -> None:
    image = Image.new("RGB", (300, 100), (0, 0, 0))
    image.paste((0, 255, 0), (100, 0, 200, 100))
    image.save(tmp_path / "p", "PNG")
    found = pictures.open_start(tmp_path / "p", 64, 64)
    assert (found[32, 4] == (0, 255, 0)).all()
    assert (found[32, 60] == (0, 255, 0)).all()


# Bombs: Pillow's error (2.5 gigapixels), its mere warning (100 megapixels), and our own limit below both.
_BOMBS = {"error": png(50_000, 50_000), "warning": png(10_000, 10_000), "ours": png(8_200, 8_200)}
_TEXT_BOMB = png(8, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80 * 2**20))))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(b"", "none of", id="empty"),
        pytest.param(b"hello world " * 50, "none of", id="text"),
        pytest.param(bytes(range(256)) * 40, "none of", id="noise"),
        pytest.param(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "none of", id="svg"),
        pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "none of", id="eps"),
        pytest.param(saved("TIFF"), "none of", id="tiff"),
        pytest.param(saved("PNG")[:60], "broken", id="cut png"),
        pytest.param(saved("JPEG")[:-300], "broken", id="cut jpeg"),
        pytest.param(saved("PNG").replace(b"IDAT", b"IDAX"), "none of", id="png without pixels"),
        pytest.param(png(0, 8), "none of", id="no width"),
        pytest.param(_BOMBS["error"], "pixels", id="bomb"),
        pytest.param(_BOMBS["warning"], "pixels", id="bomb that only warns"),
        pytest.param(_BOMBS["ours"], "pixels", id="bomb below the warning"),
        pytest.param(_TEXT_BOMB, "broken", id="text bomb"),
    ],
)
def test_files_that_are_no_good_pictures_are_the_callers_fault(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(FaultError) as caught:
        pictures.open_start(path, 64, 64)
    fault = caught.value.fault
    assert (fault.code, fault.field) == ("invalid_input_file", "image")
    assert words in fault.message


def test_a_file_over_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "p"
    with path.open("wb") as file:
        file.truncate(work.MAX_IMAGE_BYTES + 1)
    with pytest.raises(FaultError) as caught:
        pictures.open_start(path, 64, 64)
    assert caught.value.fault.code == "payload_too_large"


def masked(tmp_path: Path, size: tuple[int, int], hole: tuple[int, int, int, int]) -> tuple[Path, Path]:
    """A start image and a mask with a transparent hole."""
    start, mask = tmp_path / "start.png", tmp_path / "mask.png"
    Image.new("RGB", size, "blue").save(start)
    alpha = Image.new("RGBA", size, (0, 0, 0, 255))
    alpha.paste((0, 0, 0, 0), hole)
    alpha.save(mask)
    return start, mask


def test_a_mask_is_fitted_as_its_image_is(tmp_path: Path) -> None:
    start, mask = masked(tmp_path, (128, 64), (32, 0, 64, 64))  # 64 x 64 of it stays: columns 32 to 95
    found = pictures.open_mask(mask, start, 64, 64)
    assert found[:, :32].all()
    assert not found[:, 32:].any()
    assert pictures.latent_mask(found).tolist() == [[[[1.0] * 4 + [0.0] * 4] * 8]]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "1", "P"])
def test_a_mask_may_mark_by_white(tmp_path: Path, mode: str) -> None:
    start, path = tmp_path / "start.png", tmp_path / "mask.png"
    Image.new("RGB", (64, 64), "blue").save(start)
    mask = Image.new("RGBA", (64, 64), (100, 100, 100, 255))
    mask.paste((200, 200, 200, 255), (0, 0, 32, 64))
    mask.paste((0, 0, 0, 255), (32, 0, 64, 64))
    mask.convert(mode).save(path)
    found = pictures.open_mask(path, start, 64, 64, white=True)
    assert found[:, 32:].sum() == 0
    assert found[:, :32].all() or mode == "1", "dithered"
    assert found.any()


def test_what_is_transparent_is_not_white(tmp_path: Path) -> None:
    start, path = tmp_path / "start.png", tmp_path / "mask.png"
    Image.new("RGB", (64, 64), "blue").save(start)
    Image.new("RGBA", (64, 64), (255, 255, 255, 0)).save(path)
    with pytest.raises(FaultError, match="nothing of it is white"):
        pictures.open_mask(path, start, 64, 64, white=True)


def test_a_place_of_latents_changes_with_any_of_its_pixels() -> None:
    mask = np.zeros((16, 16), np.bool_)
    mask[15, 0] = True
    assert pictures.latent_mask(mask).tolist() == [[[[0.0, 0.0], [1.0, 0.0]]]]


def test_masks_that_are_none(tmp_path: Path) -> None:
    start, mask = masked(tmp_path, (64, 64), (0, 0, 8, 8))
    other, _ = tmp_path / "other.png", Image.new("RGB", (32, 64)).save(tmp_path / "other.png")
    opaque = tmp_path / "opaque.png"
    Image.new("RGBA", (64, 64), (0, 0, 0, 255)).save(opaque)
    for path, image, words in (
        (mask, other, "32 x 64"),
        (opaque, start, "transparent"),
        (start, start, "transparent"),
    ):
        with pytest.raises(FaultError, match=words) as refused:
            pictures.open_mask(path, image, 64, 64)
        assert (refused.value.fault.code, refused.value.fault.field) == ("invalid_input_file", "mask")
