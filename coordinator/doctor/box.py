"""What `coordinator doctor` looks at on this machine: folders, rights, disk, port, certificate."""

from __future__ import annotations

import datetime
import http.client
import os
import resource
import shutil
import socket
import ssl
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from coordinator.blobs.opening import BLOB_FOLDER, S3, BlobsRefusal, open_blobs
from coordinator.doctor.examine import Finding, Patient, bad, ok, warn
from coordinator.register import FILE_NAME
from coordinator.store.opening import STORE_FILE

LEAST_BYTES, LITTLE_BYTES = 100 * 2**20, 2 * 2**30
LITTLE_SHARE = 0.05
SOON_S = 14 * 86_400.0
ANSWER_S = 3.0
MANY_FILES = 8192  # one descriptor per worker and client, and some
SECRETS = (FILE_NAME, f"{FILE_NAME}-wal", "client.key", "worker.token", STORE_FILE)


def state(patient: Patient) -> Iterator[Finding]:
    """The folder of everything that outlives a run is there and is ours alone."""
    folder = patient.state
    if not folder.exists():
        yield ok("state", f"{folder} does not exist yet; the first start makes it.")
        return
    if not folder.is_dir() or not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        yield bad("state", f"{folder} cannot be written by this user.", "Run as the user of the coordinator, or chown.")
        return
    open_to = _open_to_others(folder)
    if open_to:
        yield warn("state", f"{folder} is open to others ({open_to}).", f"chmod 700 {folder}")
    else:
        yield ok("state", f"{folder} is there.")
    loose = [name for name in SECRETS if (folder / name).exists() and _open_to_others(folder / name)]
    for name in loose:
        cure = f"chmod 600 {folder / name}; if others are on this machine, make new keys."
        yield bad("keys", f"{name} can be read by others: keys and prompts lie in there.", cure)
    if not loose:
        yield ok("keys", "No file with secrets can be read by others.")


def _open_to_others(path: Path) -> str:
    mode = stat.S_IMODE(path.stat().st_mode)
    return f"{mode:o}" if mode & 0o077 else ""


def disk(patient: Patient) -> Iterator[Finding]:
    """There is room for jobs and files."""
    seen: set[int] = set()
    for name, folder in (("disk of state", patient.state), ("disk of blobs", _blob_folder(patient))):
        near = _nearest(folder)
        if (device := near.stat().st_dev) in seen:
            continue
        seen.add(device)
        yield room(name, near)


def room(name: str, folder: Path) -> Finding:
    """How full the disk of a folder is. Raises OSError."""
    usage = shutil.disk_usage(folder)
    sentence = f"{usage.free / 2**30:.1f} GiB of {usage.total / 2**30:.1f} are free at {folder}."
    cure = "Make room; a full disk refuses new jobs, and results with files."
    if usage.free < LEAST_BYTES:
        return bad(name, sentence, cure)
    if usage.free < LITTLE_BYTES or usage.free < LITTLE_SHARE * usage.total:
        return warn(name, sentence, cure)
    return ok(name, sentence)


def _nearest(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def blobs(patient: Patient) -> Iterator[Finding]:
    """Files of jobs can be left and fetched; in S3 a small object is written and deleted again."""
    settings = patient.config.blobs
    if settings.url.startswith(S3):
        try:
            with tempfile.TemporaryDirectory() as drafts:
                open_blobs(settings, Path(drafts))
        except (BlobsRefusal, OSError, ValueError) as error:
            yield bad("blobs", f"{settings.url} cannot be used: {str(error).splitlines()[0]}", "Correct [blobs].")
        else:
            yield ok("blobs", f"{settings.url} takes, gives, lists and deletes objects.")
        return
    folder = _blob_folder(patient)
    if not folder.exists():
        yield ok("blobs", f"{folder} does not exist yet; the first start makes it.")
    elif os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        yield ok("blobs", f"{folder} can be written.")
    else:
        yield bad("blobs", f"{folder} cannot be written by this user.", "Run as the coordinator's user, or chown.")


def _blob_folder(patient: Patient) -> Path:
    url = patient.config.blobs.url
    return Path(url) if url and not url.startswith(S3) else patient.state / BLOB_FOLDER


def port(patient: Patient) -> Iterator[Finding]:
    """The address is free, or a coordinator answers there."""
    host, _, number = patient.config.listen.rpartition(":")
    host = host.strip("[]")
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, int(number), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(target)
    except (OSError, ValueError) as error:
        if _answers(host, number, patient):
            yield ok("port", f"A coordinator answers at {patient.config.listen}.")
            return
        reason = error.strerror if isinstance(error, OSError) else str(error)
        cure = "Stop the program that has it (ss -ltnp), or choose another with listen."
        yield bad("port", f"{patient.config.listen} cannot be taken ({reason}), and no coordinator answers.", cure)
    else:
        yield ok("port", f"{patient.config.listen} is free; no coordinator runs there.")


def _answers(host: str, number: str, patient: Patient) -> bool:
    where = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    try:
        if patient.config.tls_cert:
            secure = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # who answers is the question, not who vouches for it
            secure.check_hostname, secure.verify_mode = False, ssl.CERT_NONE
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                where, int(number), timeout=ANSWER_S, context=secure
            )
        else:
            connection = http.client.HTTPConnection(where, int(number), timeout=ANSWER_S)
        try:
            connection.request("GET", "/healthz")
            answer = connection.getresponse()
            return answer.status in (200, 503) and b'"status"' in answer.read(200)
        finally:
            connection.close()
    except (OSError, ValueError, http.client.HTTPException):
        return False


def tls(patient: Patient) -> Iterator[Finding]:
    """The certificate fits its key and is good for a while."""
    cert, key = patient.config.tls_cert, patient.config.tls_key
    if not cert and not key:
        return
    try:
        left = certificate_left_s(Path(cert), Path(key))
    except ssl.SSLCertVerificationError as error:
        yield bad(
            "certificate", f"{cert} is not good: {error.verify_message}.", "Renew it and restart the coordinator."
        )
    except (OSError, ssl.SSLError) as error:
        cure = "Name the certificate with its chain in tls_cert and its key in tls_key."
        yield bad("certificate", f"{cert} and {key} cannot be used: {error}.", cure)
    else:
        until = datetime.datetime.fromtimestamp(time.time() + left, datetime.UTC).strftime("%Y-%m-%d")
        if left < SOON_S:
            yield warn("certificate", f"{cert} is good until {until} only.", "Renew it, then restart the coordinator.")
        else:
            yield ok("certificate", f"{cert} is good until {until}.")


def certificate_left_s(cert: Path, key: Path) -> float:
    """How long a certificate is still good: a handshake with ourselves in memory, which trusts just that one.

    Raises:
        SSLCertVerificationError: it has expired, or is not good yet.
        OSError, ssl.SSLError: the files cannot be used.
    """
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(cert, key)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client.load_verify_locations(cert)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking = client.wrap_bio(to_client, to_server)
    answering = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(10):
        done = 0
        for side in (asking, answering):
            try:
                side.do_handshake()
                done += 1
            except ssl.SSLWantReadError:
                pass
        if done == 2:
            break
    found = asking.getpeercert() or {}
    return ssl.cert_time_to_seconds(str(found["notAfter"])) - time.time()


def limits(_patient: Patient) -> Iterator[Finding]:
    """Enough open files for many workers and clients."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if most != resource.RLIM_INFINITY and most < MANY_FILES:
        cure = "The unit of `coordinator service install` has LimitNOFILE=65536; in a shell: ulimit -n 65536."
        yield warn("limits", f"At most {most} files may be open: so many workers and clients together.", cure)
    else:
        yield ok("limits", "Enough files may be open.")
