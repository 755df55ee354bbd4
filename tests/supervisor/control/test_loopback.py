"""The page's port with raw sockets: what every check refuses, in which order, and what is never sent."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import AsyncIterator, Mapping
from typing import Any

import psutil
import pytest
import trio

from supervisor.control import loopback
from supervisor.control.login import OFF, Logins
from supervisor.control.loopback import open_page
from supervisor.errors import NoPermission
from supervisor.settings import PageTable

ON = PageTable(enabled=True)
JSON = {"Content-Type": "application/json"}


class Page:
    """A served page, and a token for it."""

    def __init__(self, box: Any, logins: Logins) -> None:
        self.box, self.logins = box, logins
        self.port = int(logins.url.rpartition(":")[2])
        self.own = f"http://127.0.0.1:{self.port}"
        self.token = logins.swap(logins.new_code()) or ""
        self.key = {"Authorization": f"Bearer {self.token}"}

    async def ask(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str] = {},
        body: bytes = b"",
        *,
        host: str | None = None,
        address: str = "127.0.0.1",
    ) -> tuple[int, dict[str, str], bytes]:
        """One request and its answer: status, headers, body."""
        lines = [f"{method} {target} HTTP/1.1", f"Host: {host or f'127.0.0.1:{self.port}'}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if body:
            lines.append(f"Content-Length: {len(body)}")
        return await self.raw("\r\n".join([*lines, "", ""]).encode("latin-1") + body, address)

    async def raw(self, data: bytes, address: str = "127.0.0.1") -> tuple[int, dict[str, str], bytes]:
        got = b""
        with trio.fail_after(60):
            async with await trio.open_tcp_stream(address, self.port) as stream:
                with contextlib.suppress(trio.BrokenResourceError):
                    await stream.send_all(data)
                    while more := await stream.receive_some(65536):
                        got += more
        head, _, body = got.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        return int(first.split()[1]), headers, body


@pytest.fixture
async def page(box) -> AsyncIterator[Page]:
    logins = Logins()
    surface = box.surface._replace(logins=logins)
    async with open_page(ON, surface):
        yield Page(box, logins)


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


# ---- friends


async def test_the_page_its_script_and_its_style_need_no_token(page):
    for target, kind in (("/", "text/html"), ("/app.js", "text/javascript"), ("/style.css", "text/css")):
        status, headers, body = await page.ask("GET", target)
        assert (status, headers["content-type"].partition(";")[0]) == (200, kind)
        assert body


async def test_the_whole_way_in(page):
    code = page.logins.new_code()
    as_ours = {**JSON, "Origin": page.own, "Sec-Fetch-Site": "same-origin"}
    status, _headers, body = await page.ask("POST", "/v1/session", as_ours, b'{"code":"%s"}' % code.encode())
    assert status == 200
    key = {"Authorization": f"Bearer {json.loads(body)['token']}"}
    assert (await page.ask("GET", "/v1/status", key))[0] == 200
    status, _headers, _body = await page.ask("POST", "/v1/pause", {**key, **JSON}, b'{"for_s": 5}')
    assert status == 200
    assert [asked[0] for asked in page.box.acts.asked] == ["pause"]
    assert (await page.ask("DELETE", "/v1/session", {**key, **JSON}))[0] == 200
    assert (await page.ask("GET", "/v1/status", key))[0] == 401


async def test_health_needs_no_token(page):
    assert (await page.ask("GET", "/v1/health"))[0] == 200


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "[::1]"])
async def test_its_names(page, name):
    assert (await page.ask("GET", "/v1/status", page.key, host=f"{name}:{page.port}"))[0] == 200
    own = {"Origin": f"http://{name}:{page.port}", "Sec-Fetch-Site": "same-origin"}
    assert (await page.ask("GET", "/v1/status", {**page.key, **own}, host=f"{name}:{page.port}"))[0] == 200


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no [::1]")
async def test_both_addresses_have_one_port(page):
    assert (await page.ask("GET", "/v1/status", page.key, host=f"[::1]:{page.port}", address="::1"))[0] == 200


async def test_the_scheme_of_the_token_may_be_written_in_any_case(page):
    assert (await page.ask("GET", "/v1/status", {"authorization": f"bearer  {page.token} "}))[0] == 200


# ---- who is refused; each with a token, so that nothing else can be the reason


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "127.0.0.2:{port}", "0.0.0.0:{port}",
     "127.0.0.1:{port}.evil.example", "localhost.evil.example:{port}", "LOCALHOST:{port}", "127.1:{port}",
     "user@127.0.0.1:{port}", "[::ffff:127.0.0.1]:{port}"],
)  # fmt: skip
async def test_a_wrong_host_is_refused_even_for_the_page_itself(page, host):
    for target in ("/", "/v1/health", "/v1/status"):
        status, _headers, body = await page.ask("GET", target, page.key, host=host.format(port=page.port))
        assert status == 403, target
        assert "This is not" in json.loads(body)["error"]["message"]


async def test_no_host_is_refused(page):
    assert (await page.raw(b"GET /v1/health HTTP/1.0\r\n\r\n"))[0] == 403
    assert (await page.raw(b"GET /v1/health HTTP/1.1\r\n\r\n"))[0] == 400


@pytest.mark.parametrize(
    "origin",
    ["null", "http://evil.example", "http://127.0.0.1", "http://127.0.0.1:1", "https://127.0.0.1:{port}",
     "http://localhost:{port}", "http://127.0.0.1:{port}/", "http://127.0.0.1:{port}.evil.example", "", "chrome-extension://x"],
)  # fmt: skip
async def test_a_foreign_origin_is_refused(page, origin):
    headers = {**page.key, "Origin": origin.format(port=page.port)}
    assert (await page.ask("GET", "/v1/status", headers))[0] == 403
    assert (await page.ask("POST", "/v1/pause", {**headers, **JSON}, b"{}"))[0] == 403
    assert page.box.acts.asked == []


@pytest.mark.parametrize("site", ["cross-site", "same-site", "", "SAME-ORIGIN", "same-origin, none"])
async def test_another_site_is_refused(page, site):
    headers = {**page.key, "Sec-Fetch-Site": site}
    assert (await page.ask("GET", "/", headers))[0] == 403
    assert (await page.ask("POST", "/v1/pause", {**headers, **JSON}, b"{}"))[0] == 403
    assert page.box.acts.asked == []


@pytest.mark.parametrize("site", ["same-origin", "none"])
async def test_our_own_site_and_no_site_are_not(page, site):
    assert (await page.ask("GET", "/v1/status", {**page.key, "Sec-Fetch-Site": site}))[0] == 200


@pytest.mark.parametrize(
    "shown", [None, "", "Bearer", "Bearer ", "Bearer x", "Basic {token}", "{token}", "Bearer {token}x", "Bearer {half}"]
)
async def test_without_the_token_nothing_is_shown_and_nothing_happens(page, shown):
    headers = {}
    if shown is not None:
        headers = {"Authorization": shown.format(token=page.token, half=page.token[:20])}
    for target in ("/v1/status", "/v1/metrics", "/v1/nothing", "/v1/login-code"):
        assert (await page.ask("GET", target, headers))[0] == 401
    assert (await page.ask("POST", "/v1/drain", {**headers, **JSON}, b"{}"))[0] == 401
    assert page.box.acts.asked == []


async def test_a_cookie_or_a_query_is_no_token(page):
    assert (await page.ask("GET", "/v1/status", {"Cookie": f"token={page.token}"}))[0] == 401
    assert (await page.ask("GET", f"/v1/status?token={page.token}"))[0] == 401


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "text/json"]
)
@pytest.mark.parametrize("method", ["POST", "PATCH", "DELETE", "PUT", "OPTIONS"])
async def test_what_is_no_get_must_be_json(page, method, kind):
    headers = {**page.key, **({} if kind is None else {"Content-Type": kind})}
    assert (await page.ask(method, "/v1/pause", headers))[0] == 415
    assert page.box.acts.asked == []


async def test_the_checks_come_in_their_order(page):
    """Each request fails all checks from one on; the first of them answers."""
    wrong = {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site", "Content-Type": "text/plain"}
    for host, dropped, status, word in (
        ("evil.example", (), 403, "This is not"),
        (None, (), 403, "No page of 'http://evil.example'"),
        (None, ("Origin",), 403, "No page of another site"),
        (None, ("Origin", "Sec-Fetch-Site"), 401, "token"),
    ):
        headers = {name: value for name, value in wrong.items() if name not in dropped}
        found, _headers, body = await page.ask("POST", "/v1/pause", headers, b"x", host=host)
        assert (found, word in json.loads(body)["error"]["message"]) == (status, True)


async def test_a_preflight_is_refused_and_nobody_is_told_anything_of_cors(page):
    asks = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    status, headers, _body = await page.ask("OPTIONS", "/v1/pause", asks)
    assert status == 403
    answers = [headers, (await page.ask("GET", "/"))[1], (await page.ask("GET", "/v1/status", page.key))[1]]
    assert [name for answer in answers for name in answer if name.startswith("access-control")] == []


async def test_a_code_is_not_given_out_here(page):
    status, _headers, body = await page.ask("POST", "/v1/login-code", {**page.key, **JSON}, b"{}")
    assert status == 403
    assert "owner's socket" in json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    ("method", "body", "status"),
    [("POST", b'{"code": "x"}', 401), ("POST", b"{}", 400), ("POST", b'{"code": 5}', 400), ("POST", b"[", 400),
     ("POST", b'{"code": "x", "more": 1}', 400), ("PUT", b"{}", 405), ("PATCH", b"{}", 405)],
)  # fmt: skip
async def test_a_wrong_swap_is_refused(page, method, body, status):
    assert (await page.ask(method, "/v1/session", JSON, body))[0] == status


async def test_a_code_that_was_used_is_refused(page):
    body = b'{"code": "%s"}' % page.logins.new_code().encode()
    assert (await page.ask("POST", "/v1/session", JSON, body))[0] == 200
    assert (await page.ask("POST", "/v1/session", JSON, body))[0] == 401


async def test_the_files_take_get_alone(page):
    assert (await page.ask("POST", "/app.js", {**page.key, **JSON}, b"{}"))[0] == 405


@pytest.mark.parametrize(
    "target",
    [
        "/../app.py",
        "/ui/app.js",
        "//app.js",
        "/app.js/",
        "/%61pp.js",
        "/..%2f..%2fapp.py",
        "/.git/config",
        "/index.html%00",
    ],
)
async def test_nothing_else_is_served_as_a_file(page, target):
    assert (await page.ask("GET", target))[0] == 401
    assert (await page.ask("GET", target, page.key))[0] == 404


# ---- what is sent


@pytest.mark.parametrize("target", ["/", "/app.js", "/v1/health", "/v1/status", "/v1/nothing"])
async def test_every_answer_carries_the_headers_and_no_cookie(page, target):
    for key in (page.key, {}):
        _status, headers, _body = await page.ask("GET", target, key)
        policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert {policy[name] for name in ("script-src", "style-src", "connect-src", "img-src")} == {"'self'"}
        assert {policy[name] for name in ("frame-ancestors", "base-uri", "form-action")} == {"'none'"}
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert headers["referrer-policy"] == "no-referrer"
        assert "set-cookie" not in headers


async def test_a_refusal_carries_them_too(page):
    for _status, headers, _body in (
        await page.ask("GET", "/", host="evil.example"),
        await page.raw(b"no http at all\r\n\r\n"),
    ):
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]


async def test_nothing_of_the_page_comes_from_elsewhere_and_nothing_is_inline():
    texts = {path: response.body.decode() for path, response in loopback.page_files().items()}
    assert {"/", "/index.html", "/app.js", "/style.css"} <= set(texts)
    for path, text in texts.items():
        away = [word for word in text.split('"') if "://" in word and "www.w3.org" not in word]
        assert away == [], path
        assert "innerHTML" not in text, path
    html = texts["/index.html"]
    assert "<style" not in html
    assert " style=" not in html
    assert " on" not in "".join(html.split("<noscript>")[0].split("content")).replace(" one", "")
    assert html.count("<script") == html.count('<script type="module" src=')


# ---- where it is, and where it is not


async def test_it_is_off_unless_it_is_wanted(box):
    logins = Logins()
    async with open_page(PageTable(), box.surface._replace(logins=logins)):
        assert logins.url == ""
        assert logins.reason == OFF


async def test_it_goes_with_the_block(box):
    logins = Logins()
    async with open_page(ON, box.surface._replace(logins=logins)):
        port = int(logins.url.rpartition(":")[2])
        assert listening(port)
    assert logins.url == ""
    assert listening(port) == set()


def listening(port: int) -> set[str]:
    """Addresses on which this process listens at that port; whoever else has it there is not asked."""
    own = psutil.Process().net_connections("tcp")
    return {found.laddr.ip for found in own if found.status == psutil.CONN_LISTEN and found.laddr.port == port}


async def test_only_this_machine_reaches_it(page):
    assert listening(page.port) == {"127.0.0.1", *(["::1"] if has_ipv6() else [])}


async def test_a_port_that_is_taken_costs_the_page_and_says_so(box, caplog):
    logins = Logins()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with open_page(PageTable(enabled=True, port=port), box.surface._replace(logins=logins)):
            assert logins.url == ""
    assert f"port {port} of 127.0.0.1" in caplog.text
    assert "choose another port in [page]" in caplog.text


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no [::1]")
async def test_a_port_that_is_taken_on_the_other_address_is_taken(box):
    """Else whoever has it would answer at http://localhost."""
    logins = Logins()
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as taken:
        port = taken.getsockname()[1]
        async with open_page(PageTable(enabled=True, port=port), box.surface._replace(logins=logins)):
            assert logins.url == ""
            assert listening(port) == {"::1"}  # ours; the other half is not left open


async def test_a_machine_without_the_other_address_serves_the_first(box, monkeypatch):
    real = trio.open_tcp_listeners

    async def without(port: int, *, host: str) -> Any:
        if host == "::1":
            raise OSError(99, "Cannot assign requested address")
        return await real(port, host=host)

    monkeypatch.setattr(loopback.trio, "open_tcp_listeners", without)
    logins = Logins()
    async with open_page(ON, box.surface._replace(logins=logins)):
        page = Page(box, logins)
        assert (await page.ask("GET", "/v1/status", page.key))[0] == 200


async def test_a_port_of_its_own_can_be_named(box):
    logins = Logins()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    async with open_page(PageTable(enabled=True, port=port), box.surface._replace(logins=logins)):
        assert logins.url in (f"http://127.0.0.1:{port}", "")  # "": somebody took it meanwhile


async def test_a_program_comes_in_with_the_token_of_the_file(box, tmp_path):
    logins, path = Logins(), tmp_path / "page.json"
    async with open_page(ON, box.surface._replace(logins=logins), path):
        told = json.loads(path.read_text())
        page = Page(box, logins)
        assert told["url"] == page.own
        assert (await page.ask("GET", "/v1/status", {"Authorization": f"Bearer {told['token']}"}))[0] == 200
    assert not path.exists()


async def test_a_token_file_that_cannot_be_written_is_an_error_with_its_name(box, tmp_path):
    surface = box.surface._replace(logins=Logins())
    with pytest.raises(NoPermission, match=r"page\.json"):
        async with open_page(ON, surface, tmp_path / "nowhere" / "page.json"):
            pytest.fail("without its file")


async def test_the_log_names_who_was_refused_and_never_a_token(page, caplog):
    await page.ask("POST", "/v1/pause", {**page.key, **JSON, "Origin": "http://evil.example"}, b"{}")
    assert "refused POST '/v1/pause': No page of 'http://evil.example' may speak here." in caplog.text
    assert page.token not in caplog.text
