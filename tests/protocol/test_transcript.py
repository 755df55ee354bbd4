"""Transcripts: cues that players can read, whatever the engine heard."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.transcript import to_srt, to_verbose_json, to_vtt
from protocol.work import Segment, SttResult, Word

WORDS = [Word(word=" one", start=0.0, end=0.4, probability=0.9)]
RESULT = SttResult(
    text="one two",
    language="en",
    duration=3661.5,
    segments=[
        Segment(id=0, start=0.0, end=1.5, text=" one ", words=WORDS),
        Segment(id=1, start=3599.9996, end=3661.25, text=" <two> --> & more"),
    ],
)


def test_srt():
    assert to_srt(RESULT) == (
        "1\n00:00:00,000 --> 00:00:01,500\none\n\n2\n01:00:00,000 --> 01:01:01,250\n<two> --> & more\n"
    )


def test_vtt():
    assert to_vtt(RESULT) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.500\none\n\n01:00:00.000 --> 01:01:01.250\n&lt;two> --&gt; &amp; more\n"
    )


def test_verbose_json_holds_what_was_asked_for():
    plain = to_verbose_json(RESULT)
    assert (plain["task"], plain["language"], plain["duration"], plain["text"]) == (
        "transcribe",
        "en",
        3661.5,
        "one two",
    )
    assert [segment["id"] for segment in plain["segments"]] == [0, 1]
    assert "words" not in plain
    assert "words" not in plain["segments"][0]
    words = to_verbose_json(RESULT, ["word"])
    assert words["words"] == [{"word": " one", "start": 0.0, "end": 0.4}]
    assert "segments" not in words


def test_nothing_heard_is_an_empty_file():
    silent = SttResult(text="", language="en", duration=0.0)
    assert to_srt(silent) == ""
    assert to_vtt(silent) == "WEBVTT\n"


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, -3.0])
def test_odd_times_do_not_break_the_file(odd):
    result = SttResult(text="x", language="en", duration=odd, segments=[Segment(id=0, start=odd, end=odd, text="x")])
    assert "00:00:00,000 --> 00:00:00,000" in to_srt(result)


_SEGMENT = st.builds(
    Segment, id=st.integers(0, 9), start=st.floats(0, 1e6), end=st.floats(0, 1e6), text=st.text(max_size=30)
)


@given(st.lists(_SEGMENT, max_size=5))
def test_no_text_can_end_its_cue_or_begin_another(segments):
    result = SttResult(text="", language="en", duration=0.0, segments=segments)
    for text in (to_srt(result), to_vtt(result)):
        cues = re.findall(r"^\d{2,}:\d\d:\d\d[.,]\d{3} --> \d{2,}:\d\d:\d\d[.,]\d{3}$", text, re.MULTILINE)
        assert len(cues) == len(segments)
    assert to_vtt(result).count("-->") == len(segments)
