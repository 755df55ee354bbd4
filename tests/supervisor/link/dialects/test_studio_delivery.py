from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from protocol import work
from protocol.engine_wire import OutputFile
from protocol.faults import FaultError
from protocol.link_wire import RESULT_FILE, FileRef
from supervisor.link.dialects import studio_delivery as subject
from supervisor.link.dialects.studio_delivery import StudioDelivery
from supervisor.link.dialects.studio_http import Http
from supervisor.link.dialects.studio_offers import Slip
from supervisor.link.dialects.studio_register import Credentials
from supervisor.link.reconnect import Backoff
from supervisor.testing_studio_http import Exchange, Redirect, answer, form, head

SLIP = Slip(job="j/1", attempt=1, kind="image", model="m", prompt='say "ü"\r\nplease', ext="png")


class Site:
    """An HTTP server that answers in turn, the last answer for ever."""

    def __init__(self) -> None:
        self.asked: list[Exchange] = []
        self.answers: list[tuple[int, bytes | Redirect]] = [(200, b"")]
        self.url = ""

    def exchange(self, asked: Exchange) -> tuple[int, bytes | Redirect]:
        self.asked.append(asked)
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@contextlib.asynccontextmanager
async def open_site():
    site = Site()

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            with contextlib.suppress(trio.BrokenResourceError):
                while found := await head(stream):
                    await answer(stream, found[1], site.exchange)

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        site.url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        yield site
        nursery.cancel_scope.cancel()


class Told:
    """What delivery tells the claims."""

    def __init__(self) -> None:
        self.gone: list[Slip] = []
        self.large: list[tuple[Slip, bytes]] = []
        self.uploading: list[bool] = []
        self.verdicts: list[bool] = []
        self.refused: list[tuple[str, bool]] = []
        self.failing = False

    async def refuse(self, _slip: Slip, why: str, at_once: bool) -> bool:
        self.refused.append((why, at_once))
        return self.failing

    async def conflict(self, _slip: Slip) -> bool:
        return self.verdicts.pop() if self.verdicts else False


@contextlib.asynccontextmanager
async def delivering(base: str, known: bool = True):
    told = Told()
    mine = Credentials(install_id="i", worker_id="w 1", auth_token="t0ken") if known else None
    async with Http() as http:
        made = StudioDelivery(
            f"{base}/graphics/api",
            http,
            lambda: mine,
            on_uploading=lambda _slip, now: told.uploading.append(now),
            on_refused=told.refuse,
            on_conflict=told.conflict,
            on_gone=told.gone.append,
            on_large=lambda slip, body: told.large.append((slip, body)),
            backoff=lambda: Backoff(0.001, 0.002),
        )
        yield made, told


def into(path: Path) -> Callable[[], int]:
    return lambda: os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)


def wanted(url: str, name: str = "image") -> FileRef:
    return FileRef(name=name, url=url, size=0, sha256="")


def output(content: bytes, name: str = "out.png") -> OutputFile:
    return OutputFile(name, "image/png", len(content), hashlib.sha256(content).hexdigest())


async def test_an_input_of_the_studio_gets_the_token(tmp_path):
    async with open_site() as site, delivering(site.url) as (delivery, _told):
        site.answers = [(503, b""), (200, b"content")]
        moved: list[int] = []
        await delivery.fetch(wanted("/goods/x"), into(tmp_path / "x"), moved.append)
    assert (tmp_path / "x").read_bytes() == b"content"
    assert [asked.path for asked in site.asked] == ["/goods/x"] * 2
    assert site.asked[0].bearer == "t0ken"
    assert sum(moved) == 7


async def test_an_input_from_elsewhere_gets_none(tmp_path):
    async with open_site() as site, delivering("http://127.0.0.1:9") as (delivery, _told):
        site.answers = [(200, b"content")]
        await delivery.fetch(wanted(f"{site.url}/x"), into(tmp_path / "x"))
    assert site.asked[0].bearer == ""


async def test_redirects_are_followed_without_the_token_and_not_for_ever(tmp_path):
    async with open_site() as studio, open_site() as store, delivering(studio.url) as (delivery, _told):
        studio.answers = [(302, Redirect("/moved")), (307, Redirect(f"{store.url}/y?signed=1"))]
        store.answers = [(200, b"content")]
        await delivery.fetch(wanted("/x"), into(tmp_path / "x"))
        assert (tmp_path / "x").read_bytes() == b"content"
        assert [asked.bearer for asked in studio.asked] == ["t0ken", "t0ken"]
        assert [(asked.path, asked.bearer) for asked in store.asked] == [("/y?signed=1", "")]
        for location, word in (("/x", "more than 5 times"), ("file:///etc/passwd", "no http address")):
            studio.answers = [(302, Redirect(location))]
            with pytest.raises(FaultError, match=word):
                await delivery.fetch(wanted("/x"), into(tmp_path / "x"))


@pytest.mark.parametrize(("status", "code"), [(404, "input_unavailable"), (400, "input_unavailable")])
async def test_an_input_that_is_not_there(tmp_path, status, code):
    async with open_site() as site, delivering(site.url) as (delivery, _told):
        site.answers = [(status, b"")]
        with pytest.raises(FaultError) as caught:
            await delivery.fetch(wanted("/x"), into(tmp_path / "x"))
    assert caught.value.fault.code == code
    assert f"HTTP {status}" in caught.value.fault.message


@pytest.mark.parametrize(
    ("url", "content"),
    [
        ("data:image/png;base64,iVBORw==", b"\x89PNG"),
        ("DATA:;BASE64,aGk%3D", b"hi"),
        ("data:,a%20b", b"a b"),
        ("data:,", b""),
    ],
)
async def test_an_address_may_be_the_content_itself(tmp_path, url, content):
    async with delivering("http://127.0.0.1:9") as (delivery, _told):
        moved: list[int] = []
        await delivery.fetch(wanted(url), into(tmp_path / "x"), moved.append)
        assert (tmp_path / "x").read_bytes() == content
        assert moved == [len(content)]


@pytest.mark.parametrize("url", ["data:image/png;base64", "data:;base64,a", "data:;base64,?!?!", "data:;base64,\u00e4"])
async def test_content_that_cannot_be_read_is_the_callers_fault(tmp_path, url):
    async with delivering("http://127.0.0.1:9") as (delivery, _told):
        with pytest.raises(FaultError) as refused:
            await delivery.fetch(wanted(url), into(tmp_path / "x"))
        assert (refused.value.fault.code, refused.value.fault.may_retry) == ("invalid_input_file", False)


async def test_content_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(work.MAX_INPUT_BYTES, "image", 3)
    async with delivering("http://127.0.0.1:9") as (delivery, _told):
        with pytest.raises(FaultError) as refused:
            await delivery.fetch(wanted("data:,abcd"), into(tmp_path / "x"))
        assert refused.value.fault.code == "payload_too_large"


async def test_an_input_without_end_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setitem(work.MAX_INPUT_BYTES, "image", 1000)
    async with open_site() as site, delivering(site.url) as (delivery, _told):
        site.answers = [(200, b"x" * 10_000_000)]
        with pytest.raises(FaultError) as caught:
            await delivery.fetch(wanted("/x"), into(tmp_path / "x"))
    assert caught.value.fault.code == "payload_too_large"
    assert (tmp_path / "x").stat().st_size <= 1000


async def test_nobody_there_is_tried_for_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(subject, "FETCH_PATIENCE_S", 0.05)
    async with delivering("http://127.0.0.1:9") as (delivery, _told):
        with pytest.raises(FaultError) as caught:
            await delivery.fetch(wanted("/x"), into(tmp_path / "x"))
    assert caught.value.fault.code == "input_unavailable"


async def test_a_disk_that_is_full_is_told_as_such(tmp_path):
    async with open_site() as site, delivering(site.url) as (delivery, _told):
        site.answers = [(200, b"x" * 100_000)]
        with pytest.raises(FaultError) as caught:
            await delivery.fetch(wanted("/x"), lambda: os.open("/dev/full", os.O_WRONLY | os.O_CLOEXEC))
    assert caught.value.fault.code == "worker_disk_full"


async def test_a_result_goes_as_a_form(tmp_path):
    content = os.urandom(300_000) + b"\r\n--\r\n"
    (tmp_path / "out.png").write_bytes(content)

    def source() -> int:
        return os.open(tmp_path / "out.png", os.O_RDONLY | os.O_CLOEXEC)

    async with open_site() as site, delivering(site.url) as (delivery, told):
        site.answers = [(500, b""), (201, b"")]
        await delivery.upload(SLIP.text(), output(content), source)
        await delivery.upload(SLIP.text(), output(content), content)
    assert told.uploading == [True, False, True, True]
    for asked in site.asked:
        assert (asked.method, asked.bearer) == ("POST", "t0ken")
        assert asked.path == "/graphics/api/workers/w%201/jobs/j%2F1/complete"
        fields, files = form(asked.headers["content-type"], asked.body)
        assert fields == {"prompt": SLIP.prompt, "ext": "png"}
        assert files == {"image": ("j/1.png", "image/png", content)}


async def test_a_file_that_is_not_what_its_engine_said_never_arrives_whole(tmp_path):
    (tmp_path / "x").write_bytes(b"another")
    async with open_site() as site, delivering(site.url) as (delivery, _told):
        with pytest.raises(FaultError) as caught:
            await delivery.upload(
                SLIP.text(), output(b"content"), lambda: os.open(tmp_path / "x", os.O_RDONLY | os.O_CLOEXEC)
            )
        assert site.asked == []
    assert caught.value.fault.code == "engine_protocol"


@pytest.mark.parametrize(
    ("status", "gone", "again"), [(409, True, True), (404, True, True), (413, False, False), (400, False, True)]
)
async def test_a_result_that_is_refused(status, gone, again):
    async with open_site() as site, delivering(site.url) as (delivery, told):
        site.answers = [(status, b"")]
        with pytest.raises(FaultError) as caught:
            await delivery.upload(SLIP.text(), output(b"c"), b"c")
        assert len(site.asked) == 1
    assert (caught.value.fault.code, caught.value.fault.may_retry) == ("upload_failed", again)
    assert told.gone == ([SLIP] if gone else [])


@pytest.mark.parametrize(
    ("status", "at_once"), [(500, False), (503, False), (401, False), (429, False), (404, True), (410, True)]
)
async def test_a_result_that_its_holder_cannot_deliver(status, at_once):
    async with open_site() as site, delivering(site.url) as (delivery, told):
        site.answers = [(status, b"")]
        told.failing = True
        with pytest.raises(FaultError) as caught:
            await delivery.upload(SLIP.text(), output(b"c"), b"c")
        assert len(site.asked) == 1
    assert (caught.value.fault.code, caught.value.fault.may_retry) == ("upload_failed", True)
    assert told.refused == [(f"The output 'out.png' cannot be delivered: HTTP {status}.", at_once)]
    assert told.gone == []
    assert told.uploading == [True, False]


async def test_a_job_that_is_offered_here_again_takes_its_result():
    async with open_site() as site, delivering(site.url) as (delivery, told):
        site.answers = [(409, b""), (503, b""), (200, b"")]
        told.verdicts = [True]
        await delivery.upload(SLIP.text(), output(b"c"), b"c")
    assert told.gone == []
    assert len(site.asked) == 3


@pytest.mark.parametrize("known", [True, False])
async def test_a_token_that_is_not_good_now_may_be_later(known):
    async with open_site() as site, delivering(site.url, known) as (delivery, _told):
        site.answers = [(401, b"")]
        with pytest.raises(FaultError, match="HTTP 401" if known else "not registered"):
            await delivery.upload(SLIP.text(), output(b"c"), b"c", patience_s=0.05)
        assert bool(site.asked) == known


async def test_the_body_of_a_large_result_is_handed_on():
    chat = Slip(job="j", attempt=1, kind="llm", model="m")
    async with open_site() as site, delivering(site.url) as (delivery, told):
        await delivery.upload(chat.text(), output(b"body", RESULT_FILE), b"body")
        await delivery.upload(SLIP.text(), output(b"body", RESULT_FILE), b"body")  # of a picture: nobody's concern
        assert site.asked == []
    assert told.large == [(chat, b"body")]


async def test_a_claim_of_another_dialect_is_told_as_such():
    async with delivering("http://127.0.0.1:9") as (delivery, _told):
        with pytest.raises(FaultError, match="another dialect"):
            await delivery.upload("/v1/blobs/{name}", output(b"c"), b"c")
