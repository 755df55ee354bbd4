"""The `[replica]` table of coordinator.toml, checked and opened: listener, URL, secret, TLS."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import secrets
import socket
import ssl
from pathlib import Path

import msgspec

from coordinator.replicas.frames import SECRET_CHARS
from coordinator.server import Refusal, check_tls, listen

log = logging.getLogger(__name__)

MAX_SECRET_BYTES = 4096


class ReplicaTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How this coordinator and the other replicas reach each other.

    Attributes:
        listen: HOST:PORT of the door for the other replicas alone.
        advertise: HOST:PORT that reaches it from them; "" means `listen`.
        secret_file: a file with at least 16 characters, the same for all replicas; made when there is none.
        tls_cert, tls_key: PEM files of the door; "" means none.
        tls_ca: PEM file of the authority that signed the other replicas' certificates; "" means the system's.
    """

    listen: str
    secret_file: str
    advertise: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    tls_ca: str = ""


class Doorway(msgspec.Struct, frozen=True):
    """An open door.

    Attributes:
        url: what the others are told, ws:// or wss://.
        certificate: the door's files; None without TLS.
        trust: how the others' certificates are judged; None as the system does.
    """

    listener: socket.socket
    url: str
    secret: str
    certificate: tuple[Path, Path] | None = None
    trust: ssl.SSLContext | None = None


def in_folder(table: ReplicaTable, folder: Path) -> ReplicaTable:
    """The table with its relative paths as the folder's."""
    names = ("secret_file", "tls_cert", "tls_key", "tls_ca")
    return msgspec.structs.replace(
        table, **{name: str(folder / value) for name in names if (value := getattr(table, name))}
    )


def open_doorway(table: ReplicaTable) -> Doorway:
    """Check the table and bind. Raises Refusal that names the key and the cure."""
    path = Path(table.secret_file)
    if make_secret(path):
        log.warning("Made %s: replicas on other machines need a copy of it as their replica.secret_file.", path)
    secret = _secret(path)
    cert = Path(table.tls_cert) if table.tls_cert else None
    key = Path(table.tls_key) if table.tls_key else None
    check_tls(cert, key)
    trust = None
    if table.tls_ca:
        try:
            trust = ssl.create_default_context(cafile=table.tls_ca)
        except (OSError, ssl.SSLError) as error:
            raise Refusal(f"replica.tls_ca: {table.tls_ca} cannot be used: {error}.") from None
    try:
        listener = listen(table.listen)
    except Refusal as error:
        raise Refusal(f"replica.{error}") from None
    try:
        url = _url(table, listener, secure=cert is not None)
    except BaseException:
        listener.close()
        raise
    return Doorway(listener, url, secret, (cert, key) if cert and key else None, trust)


def make_secret(path: Path) -> bool:
    """Make the file, mode 0600, where there is none; of several that do so at once, one does. Raises Refusal."""
    if path.exists():
        return False
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_hex(32) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.link(partial, path)  # whole or not at all, and never over somebody else's
        finally:
            partial.unlink()
    except FileExistsError:
        return False
    except OSError as error:
        raise Refusal(
            f"replica.secret_file: {path}: There is no such file, and it cannot be made: {error.strerror}."
        ) from None
    return True


def _secret(path: Path) -> str:
    try:
        data = path.read_bytes()
        secret = data.decode("ascii").strip()
    except OSError as error:
        raise Refusal(f"replica.secret_file: {path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise Refusal(f"replica.secret_file: {path}: Expected ASCII characters.") from None
    if not SECRET_CHARS <= len(secret) or len(data) > MAX_SECRET_BYTES or any(ord(one) < 33 for one in secret):
        raise Refusal(
            f"replica.secret_file: {path}: Expected one line of at least {SECRET_CHARS} characters; "
            "make one with: openssl rand -hex 32"
        )
    return secret


def _url(table: ReplicaTable, listener: socket.socket, *, secure: bool) -> str:
    host, port = listener.getsockname()[:2]
    address = ipaddress.ip_address(host.partition("%")[0])
    if address.is_global and not secure:
        raise Refusal(
            f"replica.listen: {host} can be reached from anywhere, and prompts would cross the network in the clear. "
            "Give replica.tls_cert and replica.tls_key, or listen on an address of a private network."
        )
    where = table.advertise
    if where and not re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}", where):
        raise Refusal(f"replica.advertise: {where!r} is not HOST:PORT, such as 10.0.0.5:9090.")
    if not where:
        if address.is_unspecified:
            raise Refusal("replica.advertise: Give HOST:PORT by which the other replicas reach this one.")
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return f"{'wss' if secure else 'ws'}://{where}"
