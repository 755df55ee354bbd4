"""Files over a real server with the official client."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from coordinator.openai.files import to_wish
from protocol.faults import FaultError

DATA = b'{"a": 1}\n' * 50_000  # more than one write


@pytest.fixture
def other(served: Any) -> Iterator[openai.OpenAI]:
    """A client of another tenant."""
    key = served.coordinator.keys.create("client", tenant="other-files")
    with openai.OpenAI(base_url=served.url + "/v1", api_key=key, max_retries=0, timeout=60) as client:
        yield client


def test_a_file_comes_back_as_it_was(ai: openai.OpenAI) -> None:
    made = ai.files.create(file=("my lines.jsonl", DATA), purpose="batch")
    assert (made.object, made.bytes, made.filename, made.purpose) == ("file", len(DATA), "my lines.jsonl", "batch")
    assert made.status == "processed"
    assert made.expires_at == made.created_at + 30 * 86_400
    assert ai.files.retrieve(made.id) == made
    assert ai.files.wait_for_processing(made.id) == made
    answer = ai.files.content(made.id)
    assert answer.content == DATA
    assert answer.response.headers["content-disposition"].startswith("attachment")
    assert answer.response.headers["x-content-type-options"] == "nosniff"
    assert made.id in {file.id for file in ai.files.list()}
    gone = ai.files.delete(made.id)
    assert (gone.id, gone.deleted, gone.object) == (made.id, True, "file")
    with pytest.raises(openai.NotFoundError):
        ai.files.content(made.id)


def test_lists_come_in_pages(other: openai.OpenAI) -> None:
    made = [other.files.create(file=(f"{n}.txt", b"x"), purpose="user_data").id for n in range(5)]
    assert other.files.retrieve(made[0]).expires_at is None
    assert [file.id for file in other.files.list(limit=2)] == made[::-1], "the client follows the pages"
    first = other.files.list(limit=2, order="asc")
    assert ([file.id for file in first.data], first.has_more) == (made[:2], True)
    assert [file.id for file in other.files.list(after=made[3], order="asc")] == made[4:]
    assert other.files.list(purpose="batch").data == []


def test_another_tenant_sees_nothing_of_it(ai: openai.OpenAI, other: openai.OpenAI) -> None:
    made = ai.files.create(file=b"mine", purpose="user_data")
    for look in (other.files.retrieve, other.files.content, other.files.delete):
        with pytest.raises(openai.NotFoundError):
            look(made.id)
    assert made.id not in {file.id for file in other.files.list()}
    assert other.files.list(after=made.id).data == [], "nor whether it is there"
    assert ai.files.content(made.id).content == b"mine"


def test_a_file_may_say_how_long_it_stays(ai: openai.OpenAI) -> None:
    policy: Any = {"anchor": "created_at", "seconds": 3600}
    made = ai.files.create(file=b"x", purpose="batch", expires_after=policy)
    assert made.expires_at == made.created_at + 3600


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "purpose"),
        ({"purpose": "fine-tune"}, "purpose"),
        ({"purpose": "batch", "colour": "red"}, "colour"),
        ({"purpose": "batch", "expires_after[anchor]": "created_at"}, "expires_after.seconds"),
        ({"purpose": "batch", "expires_after[seconds]": "3600"}, "expires_after.anchor"),
        (
            {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "5"},
            "expires_after.seconds",
        ),
    ],
)
def test_refusals_name_the_field(fields: dict[str, str], field: str) -> None:
    with pytest.raises(FaultError) as refused:
        to_wish(fields)
    assert refused.value.fault.field == field


def test_what_is_refused_leaves_nothing_behind(served: Any, http: httpx.Client) -> None:
    folder = served.coordinator.parts.blobs.path("blob_" + "0" * 26).parent
    before = set(folder.iterdir())
    two = [("file", ("a", b"x")), ("file", ("b", b"y"))]
    for form in ({"data": {"purpose": "art"}, "files": {"file": b"x"}}, {"data": {"purpose": "batch"}, "files": two}):
        answer = http.post("/v1/files", **form)  # type: ignore[arg-type]
        assert answer.status_code == 400
    assert http.post("/v1/files", data={"purpose": "batch"}, files={"image": b"x"}).status_code == 400
    assert http.post("/v1/files", json={"purpose": "batch"}).status_code == 415
    assert set(folder.iterdir()) <= before


def test_sizes_are_bounded(served: Any, http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.coordinator.parts.files, "_tenant_bytes", 10)
    key = served.coordinator.keys.create("client", tenant="small")
    headers = {"authorization": f"Bearer {key}"}

    def put(size: int) -> httpx.Response:
        form = {"data": {"purpose": "user_data"}, "files": {"file": b"x" * size}}
        return http.post("/v1/files", headers=headers, **form)  # type: ignore[arg-type]

    assert put(6).status_code == 200
    assert put(6).status_code == 413
    assert "delete some" in put(6).json()["error"]["message"]
    assert put(4).status_code == 200
    assert put(0).status_code == 413


@pytest.mark.parametrize(
    ("query", "field"),
    [("limit=0", "limit"), ("limit=x", "limit"), ("order=up", "order"), ("after=" + "x" * 999, "after")],
)
def test_queries_are_checked(http: httpx.Client, query: str, field: str) -> None:
    answer = http.get(f"/v1/files?{query}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)


def test_a_digest_goes_with_a_file_both_ways(ai: openai.OpenAI, served: Any) -> None:
    digest = hashlib.sha256(DATA).hexdigest()
    said = {"x-content-sha256": digest.upper()}
    made = ai.files.create(file=("a.jsonl", DATA), purpose="batch", extra_headers=said)
    assert made.to_dict()["sha256"] == digest
    folder = served.coordinator.parts.blobs.path("blob_" + "0" * 26).parent
    before = set(folder.iterdir())
    for header, words in (("0" * 64, "another sha256"), ("abc", "64 hexadecimal digits")):
        with pytest.raises(openai.BadRequestError, match=words):
            ai.files.create(file=("a.jsonl", DATA), purpose="batch", extra_headers={"x-content-sha256": header})
    assert set(folder.iterdir()) <= before
