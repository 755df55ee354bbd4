"""Frames to a video file, one at a time, through PyAV.

Memory stays bounded by the encoder's own look-ahead: a frame is handed over and forgotten.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from protocol.faults import refuse

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]


class Codec(NamedTuple):
    """How a format is written: container, encoder, the codec's name for people, encoder and container options."""

    container: str
    encoder: str
    name: str
    options: dict[str, str]
    container_options: dict[str, str]


CODECS: dict[str, Codec] = {
    # cpu-used 8 in realtime is 20 times faster than libvpx-vp9's default; a quality target instead of a bit rate.
    "webm": Codec(
        "webm", "libvpx-vp9", "vp9", {"deadline": "realtime", "cpu-used": "8", "crf": "30", "b": "0", "row-mt": "1"}, {}
    ),
    # faststart puts the index first, so that a browser plays while it loads.
    "mp4": Codec("mp4", "libx264", "h264", {"preset": "veryfast", "crf": "20"}, {"movflags": "+faststart"}),
}
_BT601 = 6  # SMPTE 170M: what swscale's RGB to YUV computes; players guess BT.709 for larger pictures when unsaid
_LIMITED_RANGE = 1


class VideoWriter:
    """Writes one video file; a context manager. Leaving it by an exception leaves no finished file behind.

    Args:
        path: the file to write.
        format: a key of `CODECS`.
        width, height: even, as 4:2:0 colour needs.
        fps: frames per second.
        threads: of the encoder; 0 lets it choose.
    """

    def __init__(self, path: Path, format: str, width: int, height: int, fps: int, threads: int = 0) -> None:
        if width % 2 or height % 2:
            raise refuse("invalid_parameter", f"width: {width} x {height} is not even on both sides.", "width")
        self.frames = 0
        self._finished = False
        self._container: Any = None
        self._path = path
        self._rate = fps
        self._codec = CODECS[format]
        self._size = (width, height)
        self._threads = threads

    def __enter__(self) -> VideoWriter:
        try:
            with self._translated():
                self._stream = self._open()
        except BaseException:
            self._tidy()
            raise
        return self

    def _open(self) -> Any:
        """Open the file and the encoder; returns PyAV's stream."""
        import av

        codec = self._codec
        self._container = av.open(str(self._path), "w", format=codec.container, options=codec.container_options)
        stream = self._container.add_stream(codec.encoder, rate=self._rate, options=codec.options)
        stream.width, stream.height = self._size
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.thread_count = self._threads
        context.time_base = Fraction(1, self._rate)
        context.colorspace = context.color_primaries = context.color_trc = _BT601
        context.color_range = _LIMITED_RANGE
        return stream

    def write(self, pixels: Pixels) -> None:
        """Encode one frame (height, width, 3). Raises FaultError `engine_failed`."""
        import av

        with self._translated():
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = self.frames, Fraction(1, self._rate)
            self._container.mux(self._stream.encode(frame))
        self.frames += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._tidy()

    def _finish(self) -> None:
        """Flush the encoder and write the file's end."""
        if not self.frames:
            # An encoder that never saw a frame closes into a file of 0 bytes without a word.
            raise refuse("engine_failed", "There is no frame to encode.")
        with self._translated():
            self._container.mux(self._stream.encode(None))
            self._container.close()
        self._finished = True

    def _tidy(self) -> None:
        """Close in any case; an unfinished file is removed."""
        if self._container is not None:
            with contextlib.suppress(Exception):
                self._container.close()
        if not self._finished:
            self._path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        import av

        try:
            yield
        except av.FFmpegError as error:
            text = " ".join(str(error).split())[:300]
            raise refuse("engine_failed", f"{self._codec.encoder} failed: {text}.") from error
