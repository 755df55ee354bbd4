"""What `doctor` looks at on the way to the coordinator: address, TLS, the clock of the other side, the token, ports."""

from __future__ import annotations

import datetime
import email.utils
import http.client
import math
import socket
import ssl
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from supervisor.doctor import Finding, Patient, fail, ok, warn
from supervisor.errors import ConfigError
from supervisor.link.dialects import DIALECTS
from supervisor.secrets import TOKEN, secret
from supervisor.settings import CoordinatorTable

PATIENCE_S = 5.0
MOST_SKEW_S = 60.0
SOON_S = 14 * 86_400.0


def coordinator(patient: Patient) -> Iterator[Finding]:
    """The coordinator can be reached, and has our time."""
    if patient.settings is None:
        return
    table = patient.settings.coordinator
    if patient.seen is not None:
        link = patient.seen.get("link") or {}
        if link.get("connected"):
            yield ok("coordinator", f"Connected to {_plain(str(link.get('url', '')))}.")
        else:
            cure = "Look at the coordinator, and at the log: `supervisor logs --level warning`."
            yield fail("coordinator", f"Not connected: {link.get('reason') or 'it does not answer'}.", cure)
    if table.url == "embedded":
        return
    if DIALECTS[table.dialect].features.token:
        yield from _token(patient, table)
    yield from _reached(table)


def _token(patient: Patient, table: CoordinatorTable) -> Iterator[Finding]:
    try:
        secret(TOKEN, table.token_file, patient.environ)
    except ConfigError as error:
        cure = "`supervisor register URL --token-file FILE`, with the token that the coordinator gave out."
        yield fail("token", f"{'; '.join(error.problems)}.", cure)
    else:
        yield ok("token", "It can be read.")


def _reached(table: CoordinatorTable) -> Iterator[Finding]:
    """One plain HTTP request: any answer will do, the Date of it tells the other clock."""
    parts = urlsplit(table.url)
    host, secure = parts.hostname or "", parts.scheme in ("wss", "https")
    port = parts.port or (443 if secure else 80)
    try:
        date, certificate = _asked(host, port, parts.path.rstrip("/") + "/v1/worker", table if secure else None)
    except ssl.SSLCertVerificationError as error:
        cure = "Name the certificate to trust in [coordinator] tls_ca, or give the coordinator a valid one."
        yield fail("coordinator TLS", f"The certificate of {host} is refused: {error.verify_message}.", cure)
        return
    except (OSError, http.client.HTTPException) as error:
        cure = "Check the address in [coordinator] url, the network and the firewall."
        yield fail("coordinator address", f"{host} port {port} does not answer: {_words(error)}.", cure)
        return
    yield ok("coordinator address", f"{host} port {port} answers.")
    if certificate:
        yield _validity(host, certificate)
    if date is not None:
        yield _skew(date)


def _asked(
    host: str, port: int, path: str, secure: CoordinatorTable | None
) -> tuple[float | None, dict[str, Any] | None]:
    """Seconds that the other clock is ahead (None when it does not tell), and its certificate."""
    connection: http.client.HTTPConnection
    if secure is None:
        connection = http.client.HTTPConnection(host, port, timeout=PATIENCE_S)
    else:
        trust = ssl.create_default_context(cafile=secure.tls_ca or None)
        connection = http.client.HTTPSConnection(host, port, timeout=PATIENCE_S, context=trust)
    try:
        connection.connect()
        certificate = connection.sock.getpeercert() if isinstance(connection.sock, ssl.SSLSocket) else None
        before = time.time()
        connection.request("GET", path)
        response = connection.getresponse()
        middle = (before + time.time()) / 2
        text = response.getheader("Date")
        return (_ahead(text, middle) if text else None), certificate
    finally:
        connection.close()


def _ahead(text: str, middle: float) -> float | None:
    try:
        stamp = email.utils.parsedate_to_datetime(text)
    except ValueError:
        return None
    if stamp.tzinfo is None:
        stamp = stamp.replace(tzinfo=datetime.UTC)
    return stamp.timestamp() + 0.5 - middle  # whole seconds: half of one is the best guess


def _validity(host: str, certificate: dict[str, Any]) -> Finding:
    left_s = ssl.cert_time_to_seconds(str(certificate.get("notAfter", "Jan  1 00:00:00 9999 GMT"))) - time.time()
    days = math.floor(left_s / 86_400)
    if left_s < SOON_S:
        return warn("coordinator TLS", f"The certificate of {host} ends in {days} days.", "Have it renewed.")
    return ok("coordinator TLS", f"The certificate of {host} is good for {days} days.")


def _skew(ahead_s: float) -> Finding:
    if abs(ahead_s) <= MOST_SKEW_S:
        return ok("coordinator clock", "It agrees with ours.")
    way = "ahead of" if ahead_s > 0 else "behind"
    sentence = f"It is {abs(ahead_s):.0f} s {way} ours."
    return warn("coordinator clock", sentence, "Synchronise both; certificates and signed addresses need it.")


def port(patient: Patient) -> Iterator[Finding]:
    """The port of the embedded coordinator is free, while no supervisor runs."""
    if patient.settings is None or patient.settings.coordinator.url != "embedded":
        return
    listen = patient.settings.coordinator.listen
    host, _, number = listen.rpartition(":")
    host = host.strip("[]")
    if int(number) == 0:
        yield ok("port", "A free one is taken at each start.")
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(number)))
        except OSError as error:
            cure = "End what listens there, or choose another [coordinator] listen."
            yield fail("port", f"{listen} cannot be taken: {error.strerror}.", cure)
            return
    yield ok("port", f"{listen} is free.")


def _plain(url: str) -> str:
    """Without user and password."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _words(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__).rstrip(".")
