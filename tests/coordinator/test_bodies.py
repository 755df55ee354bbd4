"""JSON bodies and field tables."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.bodies import (
    JSON_BYTES,
    MAX_DEPTH,
    FieldTable,
    choice,
    decode_object,
    flag,
    model_name,
    whole_number,
    work_params,
)
from protocol.faults import FaultError


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "empty"),
        (b"  \n", "empty"),
        (b"[]", "must be a JSON object"),
        (b"{", "not JSON"),
        (b'{"a": NaN}', "not JSON"),
        (b'{"a": Infinity}', "not JSON"),
        (b'{"a": 1e999}', "not JSON|not finite"),
        (b'{"a": [18446744073709551616]}', "64 bits"),
        (b'{"a": {"b": -9223372036854775809}}', "64 bits"),
        (b'{"a": "\xff"}', "not JSON"),
        (b'{"a": "\\ud800"}', "not JSON"),
        (b'{"a":' * 100_000, "nested|not JSON"),
        (b'{"a":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", "nested deeper"),
    ],
)
def test_what_is_no_json_object_is_refused(body: bytes, words: str) -> None:
    with pytest.raises(FaultError, match=words) as caught:
        decode_object(body)
    assert caught.value.fault.http_status == 400


def test_a_deep_but_allowed_object() -> None:
    depth = MAX_DEPTH - 2
    assert decode_object(b'{"a":' + b"[" * depth + b"]" * depth + b"}")


def test_numbers_of_64_bits_are_taken() -> None:
    assert decode_object(b'{"a": [18446744073709551615, -9223372036854775808, true]}')


def test_bodies_over_http(http: Any) -> None:
    def post(**more: Any) -> tuple[int, str]:
        answer = http.post("/v1/embeddings", **more)
        return answer.status_code, answer.json()["error"]["code"]

    assert post(content=b"x" * (JSON_BYTES + 1)) == (413, "payload_too_large")
    assert post(content=iter([b"x" * 2**20] * 9)) == (413, "payload_too_large")
    assert post(content=b"<a/>", headers={"content-type": "text/xml"}) == (415, "unsupported_media_type")
    assert post(content=b'{"model": NaN}') == (400, "invalid_request")
    assert post(content=b"[" * 1_000_000) == (400, "invalid_request")
    assert post(json={"model": "m", "input": "x", "extra": 1}) == (400, "invalid_parameter")


TABLE = FieldTable(
    passed=frozenset({"a"}), handled=frozenset({"b"}), ignored=frozenset({"c"}), fixed={"d": (1, "x"), "e": ()}
)


def test_a_field_table_sorts_fields() -> None:
    assert TABLE.pick({"a": 1, "b": 2, "c": 3, "d": 1, "e": None}) == ({"a": 1}, {"b": 2})
    assert TABLE.pick({"a": None, "d": "x"}) == ({}, {})


@pytest.mark.parametrize(
    ("body", "code", "field"),
    [
        ({"z": 1}, "invalid_parameter", "z"),
        ({"z": None}, "invalid_parameter", "z"),
        ({"d": 2}, "unsupported", "d"),
        ({"d": True}, "unsupported", "d"),
        ({"e": 0}, "unsupported", "e"),
        ({"y" * 999: 0}, "invalid_parameter", "y" * 200 + "…"),
    ],
)
def test_a_field_table_refuses_by_name(body: dict[str, Any], code: str, field: str) -> None:
    with pytest.raises(FaultError) as caught:
        TABLE.pick(body)
    assert (caught.value.fault.code, caught.value.fault.field) == (code, field)


def test_small_readers() -> None:
    assert model_name({"model": "m"}) == "m"
    assert not flag({}, "stream")
    assert choice({}, "x", ("p", "q"), "p") == "p"
    for call in (
        lambda: model_name({}),
        lambda: model_name({"model": ""}),
        lambda: model_name({"model": 5}),
        lambda: flag({"stream": 1}, "stream"),
        lambda: choice({"x": "r"}, "x", ("p", "q"), "p"),
        lambda: choice({"x": []}, "x", ("p", "q"), "p"),
    ):
        with pytest.raises(FaultError):
            call()


def test_refusals_use_the_callers_words() -> None:
    with pytest.raises(FaultError) as caught:
        work_params("audio_tts", {"text": ""}, {"text": "input"})
    assert caught.value.fault.field == "input"
    assert caught.value.fault.message.startswith("input: ")
    with pytest.raises(FaultError) as caught:
        work_params("llm", {"prompt": "x", "stop": [1]}, prefix="params.")
    assert caught.value.fault.field == "params.stop[0]"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(("1", 1), ("100", 100), ("042", 42), ("0" * 5000 + "7", 7)),
        *((text, None) for text in ("", "0", "101", "-1", "+1", " 1", "1.0", "1_0", "²", "٣", "9" * 5000)),
        *((text, None) for text in ("0" * 9 + "9" * 30, "00000000199", "nan", "1\0")),
    ],
)
def test_a_number_out_of_a_text_is_within_its_bounds(text: str, number: int | None) -> None:
    assert whole_number(text, 1, 100) == number
