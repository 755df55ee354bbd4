"""What is said of errors that came in groups, and in chains."""

from __future__ import annotations

import ssl

import httpx
import trio
from trio_websocket import CloseReason, ConnectionRejected

from supervisor.link.causes import broken_words, closed_words, first, rejected_words, root, unreachable


def stranger() -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_message = "self-signed certificate"
    return error


def chained(outer: Exception, inner: Exception) -> Exception:
    try:
        raise outer from inner
    except type(outer) as error:
        return error


def test_the_innermost_cause_counts():
    error = chained(OSError("all attempts failed"), ExceptionGroup("x", [ConnectionRefusedError("refused")]))
    group = BaseExceptionGroup("x", [ExceptionGroup("y", [error])])
    assert str(root(group)) == "refused"
    assert first(group, OSError) is error
    assert first(group, ValueError) is None
    assert broken_words("the coordinator", group) == "the coordinator cannot be reached: refused"


def test_a_connection_that_was_there_broke():
    group = BaseExceptionGroup("x", [chained(trio.BrokenResourceError(), ConnectionResetError("reset"))])
    assert broken_words("the coordinator", group) == "the connection broke: reset"


def test_a_certificate_of_a_stranger_has_a_cure():
    cure = "shows a certificate that is not trusted here (self-signed certificate): name its authority in"
    group = BaseExceptionGroup("x", [chained(trio.BrokenResourceError(), stranger())])
    assert broken_words("the coordinator", group) == f"the coordinator {cure} coordinator.tls_ca"
    assert cure in unreachable("x", chained(httpx.ConnectError("x"), chained(OSError(), stranger())))
    hidden = OSError("all attempts failed")
    hidden.__context__ = stranger()
    assert cure in unreachable("x", hidden)


def test_what_a_peer_said():
    assert closed_words(CloseReason(4001, "auth")) == "the connection was closed with 4001: auth"
    assert closed_words(CloseReason(1006, None)) == "the connection was closed with 1006"
    refused = ConnectionRejected(401, (), b" no entry ")
    assert rejected_words("coordinator", refused) == "the coordinator answered the upgrade with HTTP 401: no entry"
