"""What is looked at on the machine."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from coordinator.blobs.opening import BlobsConfig, BlobsRefusal
from coordinator.config import Config
from coordinator.doctor import box as doctor_box
from coordinator.doctor.examine import Finding, Patient
from coordinator.testing import Running


def patient(tmp_path: Path, **options: Any) -> Patient:
    return Patient(Config(**options), "", tmp_path)


def one(findings: Any, name: str) -> Finding:
    found: Finding = next(finding for finding in findings if finding.name == name)
    return found


def test_the_folder_and_its_secrets_are_for_us_alone(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    secret = tmp_path / "client.key"
    secret.touch(0o600)
    assert [finding.verdict for finding in doctor_box.state(patient(tmp_path))] == ["ok", "ok"]
    secret.chmod(0o644)
    tmp_path.chmod(0o755)
    findings = list(doctor_box.state(patient(tmp_path)))
    assert one(findings, "state").verdict == "warn"
    assert one(findings, "keys").verdict == "bad"
    assert "client.key" in one(findings, "keys").sentence


def test_a_new_coordinator_has_no_folder_yet(tmp_path: Path) -> None:
    where = patient(tmp_path / "new")
    assert [finding.verdict for finding in (*doctor_box.state(where), *doctor_box.blobs(where))] == ["ok", "ok"]


def test_files_may_lie_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shared").mkdir()
    (found,) = doctor_box.blobs(patient(tmp_path, blobs=BlobsConfig(url=str(tmp_path / "shared"))))
    assert found.sentence == f"{tmp_path / 'shared'} can be written."
    opened: list[str] = []
    monkeypatch.setattr(doctor_box, "open_blobs", lambda settings, _: opened.append(settings.url))
    bucket = patient(tmp_path, blobs=BlobsConfig(url="s3://bucket"))
    assert [finding.verdict for finding in doctor_box.blobs(bucket)] == ["ok"]
    assert opened == ["s3://bucket"]

    def refused(*_: object) -> None:
        raise BlobsRefusal("blobs.url: NoSuchBucket. Make the bucket, or correct blobs.url.")

    monkeypatch.setattr(doctor_box, "open_blobs", refused)
    (found,) = doctor_box.blobs(bucket)
    assert found.verdict == "bad"
    assert "NoSuchBucket" in found.sentence


@pytest.mark.parametrize(
    ("free", "verdict"), [(50 * 2**30, "ok"), (4 * 2**30, "warn"), (2**30, "warn"), (2**20, "bad")]
)
def test_room_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, verdict: str) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100 * 2**30, 0, free))
    (found,) = doctor_box.disk(patient(tmp_path / "a" / "b"))
    assert found.verdict == verdict
    assert bool(found.cure) == (verdict != "ok")


def test_the_port_is_free_ours_or_nonsense(tmp_path: Path, served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_box, "ANSWER_S", 60.0)
    assert next(iter(doctor_box.port(patient(tmp_path, listen="127.0.0.1:0")))).verdict == "ok"
    ours = served.url.removeprefix("http://")
    (found,) = doctor_box.port(patient(tmp_path, listen=ours))
    assert found.verdict == "ok"
    assert "A coordinator answers" in found.sentence
    (found,) = doctor_box.port(patient(tmp_path, listen="nonsense"))
    assert found.verdict == "bad"


def test_a_port_that_somebody_else_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_box, "ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        (found,) = doctor_box.port(patient(tmp_path, listen=f"127.0.0.1:{stranger.getsockname()[1]}"))
    assert found.verdict == "bad"
    assert "no coordinator answers" in found.sentence


def certificate(folder: Path, days: int) -> tuple[Path, Path]:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl, which makes the certificate of this test, is not installed")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=here", "-days", str(days), "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


@pytest.mark.parametrize(("days", "verdict"), [(90, "ok"), (5, "warn")])
def test_how_long_the_certificate_is_good(tmp_path: Path, days: int, verdict: str) -> None:
    cert, key = certificate(tmp_path, days)
    assert abs(doctor_box.certificate_left_s(cert, key) - days * 86_400) < 600
    (found,) = doctor_box.tls(patient(tmp_path, tls_cert=str(cert), tls_key=str(key)))
    assert found.verdict == verdict


def test_a_certificate_that_has_expired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cert, key = certificate(tmp_path, 1)

    def expired(*_: Path) -> float:
        error = ssl.SSLCertVerificationError()
        error.verify_message = "certificate has expired"
        raise error

    monkeypatch.setattr(doctor_box, "certificate_left_s", expired)
    (found,) = doctor_box.tls(patient(tmp_path, tls_cert=str(cert), tls_key=str(key)))
    assert found.verdict == "bad"
    assert "has expired" in found.sentence


def test_a_certificate_without_its_key(tmp_path: Path) -> None:
    cert, _ = certificate(tmp_path, 30)
    (found,) = doctor_box.tls(patient(tmp_path, tls_cert=str(cert), tls_key=str(cert)))
    assert found.verdict == "bad"
    assert list(doctor_box.tls(patient(tmp_path))) == []
