"""Transcripts as people and players read them: plain text, SubRip, WebVTT, verbose JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import msgspec

from protocol.work import Segment, SttResult


def to_srt(result: SttResult) -> str:
    """SubRip: numbered cues, times as HH:MM:SS,mmm."""
    cues = [
        f"{number}\n{_clock(segment.start, ',')} --> {_clock(segment.end, ',')}\n{_lines(segment)}\n"
        for number, segment in enumerate(result.segments, 1)
    ]
    return "\n".join(cues)


def to_vtt(result: SttResult) -> str:
    """WebVTT: times as HH:MM:SS.mmm; `-->` inside a text would end the cue, so it is escaped."""
    cues = [
        f"{_clock(segment.start, '.')} --> {_clock(segment.end, '.')}\n{_vtt_text(segment)}\n"
        for segment in result.segments
    ]
    return "\n".join(["WEBVTT\n", *cues])


def to_verbose_json(result: SttResult, granularities: Iterable[str] = ("segment",)) -> dict[str, Any]:
    """OpenAI's verbose_json; `granularities` holds "segment" and/or "word"."""
    wanted = set(granularities)
    body: dict[str, Any] = {
        "task": result.task,
        "language": result.language,
        "duration": result.duration,
        "text": result.text,
    }
    if "segment" in wanted:
        body["segments"] = [
            {name: value for name, value in msgspec.structs.asdict(segment).items() if name != "words"}
            for segment in result.segments
        ]
    if "word" in wanted:
        body["words"] = [
            {"word": word.word, "start": word.start, "end": word.end}
            for segment in result.segments
            for word in segment.words
        ]
    return body


def _lines(segment: Segment) -> str:
    """A blank line would end the cue, so there is none inside."""
    return re.sub(r"\s*[\r\n]\s*", "\n", segment.text.strip())


def _vtt_text(segment: Segment) -> str:
    return _lines(segment).replace("&", "&amp;").replace("<", "&lt;").replace("-->", "--&gt;")


def _clock(seconds: float, point: str) -> str:
    milliseconds = max(0, round(seconds * 1000)) if math.isfinite(seconds) else 0
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{milliseconds // 1000:02}{point}{milliseconds % 1000:03}"
