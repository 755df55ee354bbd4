from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgspec
import pytest
import trio

from protocol.link_wire import Capabilities
from supervisor.link.dialects import studio_offers as offers
from supervisor.link.dialects import studio_register as subject
from supervisor.link.dialects.studio_http import Http
from supervisor.link.dialects.studio_register import Credentials, CredentialsFile, Registration, base_url
from supervisor.testing_studio import open_studio_server

CAN = offers.capabilities(Capabilities(), offers.Facts(machine="b", user=""), draining=False)


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("https://x.org", "https://x.org/graphics/api"),
        ("https://x.org/", "https://x.org/graphics/api"),
        ("https://x.org/graphics/api/", "https://x.org/graphics/api"),
        ("wss://x.org/studio/?a=b#c", "https://x.org/studio/graphics/api"),
        ("ws://x.org:81/a/graphics/api", "http://x.org:81/a/graphics/api"),
    ],
)
def test_the_base_of_all_addresses(url, base):
    assert base_url(url) == base


@pytest.mark.parametrize("url", ["ftp://x", "x.org", "https://"])
def test_other_schemes_are_an_error(url):
    with pytest.raises(ValueError, match="no http"):
        base_url(url)


def test_the_file_is_private_and_one_whole(tmp_path):
    file = CredentialsFile(tmp_path / "studio")
    fresh = file.read("s")
    assert not file.path.exists()
    done = msgspec.structs.replace(fresh, worker_id="w", auth_token="t")
    file.write(done)
    assert file.path.stat().st_mode & 0o777 == 0o600
    assert file.path.parent.stat().st_mode & 0o777 == 0o700
    assert os.listdir(file.path.parent) == ["credentials.json"]
    assert file.read("s") == done
    assert "t" not in repr(done).removeprefix("Credentials")


def test_another_studio_is_shown_nothing_of_this_one(tmp_path):
    file = CredentialsFile(tmp_path)
    file.write(Credentials(install_id="i", studio="one", worker_id="w", auth_token="t", secret="s"))
    assert file.read("two") == Credentials(install_id="i", studio="two")


def test_a_file_that_cannot_be_read_is_not_written_over(tmp_path):
    file = CredentialsFile(tmp_path)
    file.path.write_text("{")
    with pytest.raises(ValueError, match=r"credentials\.json cannot be read"):
        file.read("s")


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    file = CredentialsFile(tmp_path)
    file.write(Credentials(install_id="i", studio="s"))

    def full(_fd: int) -> None:
        raise OSError(28, "no space")

    monkeypatch.setattr(subject.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        file.write(Credentials(install_id="i", studio="s", worker_id="w"))
    assert file.read("s").worker_id == ""
    assert os.listdir(tmp_path) == ["credentials.json"]


@contextlib.asynccontextmanager
async def registering(server, folder: Path):
    """A registration in the background; yields what waits for its end."""
    file = CredentialsFile(folder)
    ends: list[object] = []
    over = trio.Event()
    async with Http() as http, trio.open_nursery() as nursery:
        made = Registration(base_url(server.url), http, file, lambda: CAN, agent="studio-worker/1", poll_s=0.02)

        async def work() -> None:
            ends.append(await made.credentials())
            over.set()

        async def end() -> object:
            with trio.fail_after(60):
                await over.wait()
            return ends[0]

        nursery.start_soon(work)
        yield file, end
        nursery.cancel_scope.cancel()


async def test_a_token_that_cannot_be_kept_is_not_used(tmp_path, monkeypatch):
    async with open_studio_server() as server:
        async with registering(server, tmp_path) as (file, end):
            await server.until(lambda: server.requests, "a request")
            original, fails = CredentialsFile.write, [True]

            def write(self: CredentialsFile, credentials: Credentials) -> None:
                if credentials.auth_token and fails:
                    fails.pop()
                    raise OSError(28, "no space")
                original(self, credentials)

            monkeypatch.setattr(CredentialsFile, "write", write)
            server.approve(next(iter(server.requests)))
            known = await end()
        assert server.minted == 2, "the first one was lost, and another was minted"
        assert isinstance(known, Credentials)
        assert known.auth_token == server.workers[known.worker_id], "the one that is good now"
        assert file.read(base_url(server.url)) == known
        assert (known.secret, known.request_id) == ("", "")


async def test_the_secret_is_kept_before_its_hash_is_told(tmp_path):
    async with open_studio_server() as server:
        server.create_status = 500
        async with registering(server, tmp_path) as (file, _end):
            await server.until(lambda: file.path.exists(), "the file")
            first = file.read(base_url(server.url))
            assert (len(first.secret), first.request_id) == (64, "")
        server.create_status = 0
        server.approving = True
        async with registering(server, tmp_path) as (_file, end):
            assert await end()
        [request] = server.requests.values()
        assert request["registrationSecretHash"] == subject.hashlib.sha256(first.secret.encode()).hexdigest()
        assert request["installId"] == first.install_id


async def test_what_a_server_asks_for_in_retry_after_is_kept_within_reason():
    from supervisor.link.dialects.studio_http import Answer

    assert Answer(b"", "7").retry_after_s == 7
    assert Answer(b"", "Wed, 21 Oct 2026 07:28:00 GMT").retry_after_s is None
