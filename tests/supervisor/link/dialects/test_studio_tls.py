"""All of the studio dialect over TLS: registration, the socket, inputs and uploads; and a certificate of a stranger."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

import pytest

from supervisor.link.dialects.studio_register import Credentials, CredentialsFile, base_url
from supervisor.testing_studio import open_studio_server
from tests.certificates import self_signed
from tests.supervisor.link.dialects.studio_rig import TASKS, open_bench


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    """mine.pem and other.pem, which sign themselves, with their keys."""
    for name in ("mine", "other"):
        self_signed(tmp_path, name)
    return tmp_path


@pytest.fixture
def served(certificates: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates / "mine.pem", certificates / "mine.key")
    return context


def trusting(folder: Path, name: str) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(folder / f"{name}.pem"))


async def test_everything_goes_over_tls(certificates: Path, served: ssl.SSLContext, tmp_path: Path) -> None:
    async with open_studio_server(tls=served) as server:
        assert server.url.startswith("https://")
        server.approving, server.goods["speech.wav"] = True, b"RIFF"
        async with open_bench(tmp_path, server.url, tls=trusting(certificates, "mine"), play=False) as bench:
            session = await server.session()
            heard = server.enqueue(TASKS["audio_stt"], "audio_stt-model")
            run = await bench.next_run()
            assert run.run.request.inputs["audio"].read_bytes() == b"RIFF"
            run.finish()
            await server.ended(heard)
            painted = server.enqueue(TASKS["image"], "image-model")
            (await bench.next_run()).finish(b"picture" * 100_000)
            await server.ended(painted)
            await bench.empty()
            assert (heard.state, painted.state, painted.file) == ("done", "done", b"picture" * 100_000)
            await session.close(1001)
            await server.session(1)


async def test_a_certificate_of_a_stranger_ends_the_session_with_the_cure(
    certificates: Path, served: ssl.SSLContext, tmp_path: Path
) -> None:
    async with open_studio_server(tls=served) as server:
        known = Credentials(
            install_id="i", studio=base_url(server.url), worker_id="w-1", auth_token=server.admit("w-1", "t0ken")[1]
        )
        CredentialsFile(tmp_path / "studio").write(known)
        async with open_bench(tmp_path, server.url, tls=trusting(certificates, "other")) as bench:
            await server.until(lambda: len(bench.ends) >= 2, "ends")
        assert not server.past, "nothing was said to it"
    assert not any(end.final for end in bench.ends), "a certificate may be mended where it is shown"
    assert "a certificate that is not trusted here" in bench.ends[0].sentence
    assert "coordinator.tls_ca" in bench.ends[0].sentence


async def test_a_stranger_is_not_asked_to_let_anybody_in(
    certificates: Path, served: ssl.SSLContext, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with open_studio_server(tls=served) as server:
        async with open_bench(tmp_path, server.url, tls=trusting(certificates, "other")):
            await server.until(lambda: "not trusted here" in caplog.text, "a warning")
        assert not server.requests
    assert "coordinator.tls_ca" in caplog.text
    assert caplog.text.count("not registered yet") == 1, "once, not at every try"
