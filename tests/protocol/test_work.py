"""Parameters: what is good passes, what is bad is refused by the name of its field, and nothing else is raised."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import work
from protocol.engine_wire import pack
from protocol.faults import CODES, FaultError, Owner

ROOT = Path(__file__).resolve().parents[2]
GOOD = [
    ("llm", {"prompt": ""}),
    ("llm", {"messages": [{"role": "user", "content": "x"}], "temperature": 0, "seed": 2**63 - 1}),
    ("llm", {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "tools": [{}]}),
    ("embedding", {"input": ["a", "b"], "dimensions": 1}),
    ("embedding", {"input": [[1, 2], [3]]}),
    ("rerank", {"query": "q", "documents": [""], "top_n": 1}),
    ("audio_stt", {}),
    ("audio_stt", {"prompt": [1, 2], "language": "en", "chunk_length_s": 30}),
    ("audio_tts", {"text": "x", "speed": 0.25, "format": "opus"}),
    ("image", {"prompt": "x", "width": 16, "height": 4096}),
    ("video", {"prompt": "x", "seconds": 600, "fps": 6}),
    ("command", {"args": {"a": "x", "b": 1, "c": True, "d": 0.5}, "env": {"A_1": "x"}, "config": [1]}),
    ("x-mine", {"anything": [1, None]}),
]

BAD = [
    ("llm", {}, "messages"),
    ("llm", {"prompt": "x", "messages": [{"role": "user"}]}, "messages"),
    ("llm", {"messages": []}, "messages"),
    ("llm", {"messages": [{"role": "boss", "content": "x"}]}, "messages[0].role"),
    ("llm", {"prompt": "x", "temperature": 2.1}, "temperature"),
    ("llm", {"prompt": "x", "temperature": math.nan}, "temperature"),
    ("llm", {"prompt": "x", "top_p": 0}, "top_p"),
    ("llm", {"prompt": "x", "max_tokens": 0}, "max_tokens"),
    ("llm", {"prompt": "x", "seed": -1}, "seed"),
    ("llm", {"prompt": "x", "seed": 2**63}, "seed"),
    ("llm", {"prompt": "x", "stop": [""]}, "stop[0]"),
    ("llm", {"prompt": "x", "stop": ["a"] * 17}, "stop"),
    ("llm", {"prompt": "x", "temprature": 1}, "temprature"),
    ("llm", {"prompt": "x", "grammar": "g", "json_schema": {}}, "grammar"),
    ("llm", {"prompt": "x" * (work.MAX_TEXT_CHARS + 1)}, "prompt"),
    ("embedding", {}, "input"),
    ("embedding", {"input": []}, "input"),
    ("embedding", {"input": ["a", ""]}, "input"),
    ("embedding", {"input": ["a", [1]]}, "input"),
    ("embedding", {"input": [[]]}, "input"),
    ("embedding", {"input": [[True]]}, "input"),
    ("embedding", {"input": [[-1]]}, "input"),
    ("embedding", {"input": ["x"] * (work.MAX_BATCH + 1)}, "input"),
    ("rerank", {"query": "q", "documents": []}, "documents"),
    ("audio_stt", {"chunk_length_s": 0}, "chunk_length_s"),
    ("audio_stt", {"beam_size": 100_000}, "beam_size"),
    ("audio_stt", {"prompt": [-1]}, "prompt[0]"),
    ("audio_stt", {"language": "english please"}, "language"),
    ("audio_tts", {"text": " \n"}, "text"),
    ("audio_tts", {"text": "x", "speed": math.inf}, "speed"),
    ("audio_tts", {"text": "x", "format": "midi"}, "format"),
    ("image", {"prompt": ""}, "prompt"),
    ("image", {"prompt": "x", "width": 511}, "width"),
    ("image", {"prompt": "x", "height": 8}, "height"),
    ("image", {"prompt": "x", "steps": 501}, "steps"),
    ("image", {"prompt": "x", "strength": 0}, "strength"),
    ("image", {"prompt": "x", "guidance": math.nan}, "guidance"),
    ("video", {"prompt": "x", "seconds": 600, "fps": 60}, "seconds"),
    ("video", {"prompt": "x", "seconds": 0.001}, "seconds"),
    ("video", {"prompt": "x", "seconds": math.nan}, "seconds"),
    ("video", {"prompt": "x", "width": 100}, "width"),
    ("command", {"env": {"A=B": "x"}}, "env"),
    ("command", {"args": {"a": "\0"}}, "args"),
    ("command", {"args": {"a": [1]}}, "args"),
]


@pytest.mark.parametrize(("kind", "params"), GOOD)
def test_good_parameters_pass_from_json_and_from_msgpack(kind, params):
    parsed = work.parse_params(kind, params)
    assert parsed == work.parse_params(kind, pack(params))
    assert parsed == work.parse_params(kind, pack(parsed))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("kind", "params", "field"), BAD)
def test_bad_parameters_are_refused_by_name(kind, params, field, packed):
    with pytest.raises(FaultError) as caught:
        work.parse_params(kind, pack(params) if packed else params)
    fault = caught.value.fault
    assert (fault.code, fault.owner) == ("invalid_parameter", Owner.CALLER)
    assert fault.field == field or (fault.field or "").startswith(f"{field}.")
    assert fault.message.startswith(fault.field)


@pytest.mark.parametrize("kind", ["nope", "", "x-", "x-A", "X-a", "x-" + "a" * 64, "x-a b"])
def test_an_unknown_kind_is_unsupported(kind):
    assert not work.is_kind(kind)
    with pytest.raises(FaultError) as caught:
        work.parse_params(kind, {})
    assert (caught.value.fault.code, caught.value.fault.field) == ("unsupported", "kind")


_ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def _only_faults(kind, value):
    fault = None
    try:
        work.parse_params(kind, value)
    except FaultError as error:
        fault = error.fault
    assert fault is None or (fault.code in CODES and fault.message)


@given(st.sampled_from([*work.PARAMS, "x-a"]), st.data())
def test_anything_at_all_passes_or_is_a_fault(kind, data):
    names = msgspec.structs.fields(work.PARAMS[kind]) if kind in work.PARAMS else ()
    known = st.sampled_from([field.name for field in names] or ["text"])
    _only_faults(kind, data.draw(st.dictionaries(known, _ANY, max_size=5) | _ANY))


@given(st.sampled_from([*work.PARAMS, "x-a"]), st.binary(max_size=100))
def test_hostile_bytes_pass_or_are_a_fault(kind, data):
    _only_faults(kind, msgspec.Raw(data))


@pytest.mark.parametrize("kind", ["llm", "command", "x-a"])
@pytest.mark.parametrize(
    "data",
    [b"", b"\xc1", b"\x81\xa6config" + b"\x91" * 100_000, b"\x81\xa1\xff\xa1\xff", b"\xdf\xff\xff\xff\xff", b"\xd9"],
)
def test_bytes_that_broke_decoders(kind, data):
    with pytest.raises(FaultError):
        work.parse_params(kind, msgspec.Raw(data))


def test_nesting_without_end_is_refused():
    deep: list = []
    for _ in range(sys.getrecursionlimit() * 2):
        deep = [deep]
    _only_faults("llm", {"messages": [{"role": "user", "content": "x"}], "tools": [{"x": deep}]})
    _only_faults("command", {"config": deep})


def test_every_kind_has_parameters_and_a_result():
    assert set(work.PARAMS) == set(work.RESULTS) == {str(kind) for kind in work.Kind}
    assert set(work.INPUTS) <= set(work.PARAMS)


@pytest.mark.parametrize(("kind", "params"), [row for row in GOOD if row[0] in work.PARAMS])
def test_parameters_survive_json(kind, params):
    parsed = work.parse_params(kind, params)
    assert work.parse_params(kind, msgspec.json.decode(msgspec.json.encode(parsed))) == parsed


@given(st.floats(0.1, 60), st.integers(1, 60))
def test_the_frames_of_a_video(seconds, fps):
    try:
        params = work.parse_params("video", {"prompt": "x", "seconds": seconds, "fps": fps})
    except FaultError:
        assert not 1 <= round(seconds * fps) <= work.MAX_VIDEO_FRAMES
    else:
        assert params.frames == round(seconds * fps)


_AT_ONCE = """
import os, sys, threading
import msgspec
from protocol import work

def parse(barrier, kind, raw):
    barrier.wait()
    work.parse_params(kind, raw)

sys.setswitchinterval(1e-6)
llm = msgspec.Raw(msgspec.msgpack.encode({"messages": [{"role": "user", "content": "x"}]}))
image = msgspec.Raw(msgspec.msgpack.encode({"prompt": "x"}))
for _ in range(30):
    if pid := os.fork():
        assert os.waitpid(pid, 0)[1] == 0
        continue
    barrier = threading.Barrier(8)
    threads = [
        threading.Thread(target=parse, args=(barrier, *work_)) for work_ in [("llm", llm), ("image", image)] * 4
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each round is a fork")
def test_the_first_two_runs_of_an_engine_may_be_parsed_at_once():
    """msgspec 0.22 crashes when two threads find out about the same struct at once."""
    found = subprocess.run([sys.executable, "-c", _AT_ONCE], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert (found.returncode, found.stderr) == (0, "")
