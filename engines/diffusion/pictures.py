"""Pixels to picture files, and untrusted picture files to pixels, through Pillow."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps, UnidentifiedImageError

from protocol import work
from protocol.faults import FaultError, refuse

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]  # (height, width, 3), RGB
    Mask = NDArray[np.bool_]  # (height, width), true where a picture may change

# Content decides, never the file name. Pillow knows more formats; some start other programs (EPS: Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_START_PIXELS = 64 * 2**20  # about 200 MB decoded; a PNG of a few KB can claim gigapixels
NEARER_WHITE = 128  # of 255
_WEBP_METHOD = 4  # Pillow's middle way between speed and size


def encode(pixels: Pixels, format: str, quality: int) -> bytes:
    """One picture as a file.

    Args:
        pixels: (height, width, 3).
        format: a key of work.IMAGE_MIME.
        quality: 1 to 100 for JPEG and WebP; PNG has no loss and ignores it.
    """
    options: dict[str, Any] = {"png": {}, "webp": {"method": _WEBP_METHOD}, "jpeg": {}}[format]
    if format != "png":
        options = {**options, "quality": quality}
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format.upper(), **options)
    return buffer.getvalue()


def open_start(path: Path, width: int, height: int, field: str = "image") -> Pixels:
    """Decode a start image and fit it: scaled to cover width x height, the overhang cut evenly.

    Turned upright by its EXIF tag; of an animation, the first frame; transparency becomes black.

    Raises:
        FaultError: `payload_too_large`, or `invalid_input_file` for what is no picture, is broken, or is a
            decompression bomb; `field` is named.
    """
    with _opened(path, field) as image:
        return _fit(image, width, height, field)


def open_mask(path: Path, start: Path, width: int, height: int, *, white: bool = False) -> Mask:
    """Decode a mask: its fully transparent places are where the start image may change; fitted as that image is.

    Args:
        white: it marks them by white instead; what is transparent is black then.

    Raises:
        FaultError: as `open_start`, naming "mask"; `invalid_input_file` when it has another size than the start
            image, no transparency where that marks, or no place that is marked.
    """
    import numpy as np

    with _opened(start, "image") as image:
        size = ImageOps.exif_transpose(image).size
    with _opened(path, "mask") as mask:
        if mask.width * mask.height > MAX_START_PIXELS:
            raise _too_many_pixels("mask")
        mask.load()
        if not white and not mask.has_transparency_data:
            raise refuse("invalid_input_file", "mask: nothing of it is transparent, so nothing may change.", "mask")
        upright = ImageOps.exif_transpose(mask)
        if upright.size != size:
            sizes = f"{upright.width} x {upright.height}, and the image has {size[0]} x {size[1]}"
            raise refuse("invalid_input_file", f"mask: it has {sizes} pixels; they must be the same.", "mask")
        marks = _lightness(upright) if white else upright.convert("RGBA").getchannel("A")
        levels = np.asarray(ImageOps.fit(marks, (width, height), Image.Resampling.NEAREST))
        found: Mask = levels >= NEARER_WHITE if white else levels == 0
    if not found.any():
        mark = "white" if white else "fully transparent"
        raise refuse("invalid_input_file", f"mask: nothing of it is {mark}, so nothing may change.", "mask")
    return found


def _lightness(image: Image.Image) -> Image.Image:
    """On black, so that what is transparent marks nothing, whatever colour lies under it."""
    seen = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", seen.size, (0, 0, 0, 255)), seen).convert("L")


def latent_mask(mask: Mask) -> NDArray[np.float32]:
    """The mask at the size of latents, (1, 1, height / 8, width / 8): 1 where any pixel of a place may change."""
    import numpy as np

    height, width = mask.shape
    blocks = mask.reshape(height // 8, 8, width // 8, 8).any(axis=(1, 3))
    return np.asarray(blocks, np.float32).reshape(1, 1, height // 8, width // 8)


@contextlib.contextmanager
def _opened(path: Path, field: str) -> Iterator[Image.Image]:
    """A picture file of a stranger. Raises FaultError as `open_start` says, also for what the block meets."""
    if path.stat().st_size > work.MAX_IMAGE_BYTES:
        raise refuse("payload_too_large", f"{field}: the file exceeds {work.MAX_IMAGE_BYTES} bytes.", field)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                yield image
    except (FaultError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_many_pixels(field) from None
    except UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise refuse("invalid_input_file", f"{field}: the file is none of {known}.", field) from None
    except Exception as error:  # the decoders raise OSError, SyntaxError, ValueError, struct.error and more
        text = " ".join(str(error).split())[:200]
        raise refuse("invalid_input_file", f"{field}: the picture is broken: {text}.", field) from error


def _fit(image: Image.Image, width: int, height: int, field: str) -> Pixels:
    import numpy as np

    if image.width * image.height > MAX_START_PIXELS:
        raise _too_many_pixels(field)
    image.load()
    upright = ImageOps.exif_transpose(image)
    if upright.has_transparency_data:
        clear = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", clear.size, (0, 0, 0, 255)), clear)
    fitted = ImageOps.fit(upright.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    return np.asarray(fitted, np.uint8)


def _too_many_pixels(field: str) -> FaultError:
    return refuse("invalid_input_file", f"{field}: the picture exceeds {MAX_START_PIXELS} pixels.", field)
