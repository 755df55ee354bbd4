"""An S3 server for tests: moto's, behind a door that checks each signature as Amazon says.

moto itself takes any signature. The door computes it anew with botocore, which is another implementation than the
one that signs (obstore's), for signed headers and for presigned URLs, and looks at the expiry.
"""

from __future__ import annotations

import datetime
import hmac
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs, parse_qsl, urlencode

import msgspec
from botocore.auth import S3SigV4Auth, S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

ID, SECRET = "AKIDTEST", "the/secret+of/tests"
BUCKET = "files"


class S3Rig(msgspec.Struct):
    """A server with one bucket. `seen`: method and path of every request, `refused`: codes of those refused."""

    endpoint: str
    seen: list[str] = []
    refused: list[str] = []


class _Quiet(WSGIRequestHandler):
    def log(self, *_args: Any) -> None:
        """Say nothing."""


@contextmanager
def s3_server() -> Iterator[S3Rig]:
    """Serve on a free port of 127.0.0.1."""
    rig = S3Rig("")
    inner = DomainDispatcherApplication(create_backend_app)

    def door(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        rig.seen.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
        code = _judge(environ)
        if code:
            rig.refused.append(code)
            start("403 Forbidden", [("content-type", "application/xml")])
            return [f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()]
        return inner(environ, start)  # type: ignore[no-any-return]

    server = make_server("127.0.0.1", 0, door, threaded=True, request_handler=_Quiet)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    rig.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        import boto3

        client = boto3.client(
            "s3",
            endpoint_url=rig.endpoint,
            region_name="us-east-1",
            aws_access_key_id=ID,
            aws_secret_access_key=SECRET,
        )
        client.create_bucket(Bucket=BUCKET)
        client.close()
        yield rig
    finally:
        server.shutdown()
        thread.join(60)
        server.server_close()


def _judge(environ: dict[str, Any]) -> str:
    """The code of a refusal; "" for a good signature."""
    path, _, query = environ["RAW_URI"].partition("?")
    url = f"http://{environ['HTTP_HOST']}{path}"
    values = parse_qs(query)
    if "X-Amz-Signature" in values:
        rest = [(name, value) for name, value in parse_qsl(query, keep_blank_values=True) if name != "X-Amz-Signature"]
        request = AWSRequest(environ["REQUEST_METHOD"], f"{url}?{urlencode(rest)}", {"host": environ["HTTP_HOST"]})
        auth: Any = S3SigV4QueryAuth(Credentials(ID, SECRET), "s3", "us-east-1")
        date, given = values["X-Amz-Date"][0], values["X-Amz-Signature"][0]
        begun = datetime.datetime.strptime(date, "%Y%m%dT%H%M%S%z")
        late = datetime.datetime.now(datetime.UTC) - begun
        if late.total_seconds() > int(values["X-Amz-Expires"][0]):
            return "AccessDenied"
    else:
        fields = environ.get("HTTP_AUTHORIZATION", " ").partition(" ")[2]
        parts = dict(part.strip().split("=", 1) for part in fields.split(",") if part)
        if not parts:
            return "AccessDenied"
        if parts["Credential"].split("/")[0] != ID:
            return "InvalidAccessKeyId"
        headers = {name: environ[_wsgi(name)] for name in parts["SignedHeaders"].split(";")}
        request = AWSRequest(environ["REQUEST_METHOD"], f"{url}?{query}" if query else url, headers)
        auth = S3SigV4Auth(Credentials(ID, SECRET), "s3", "us-east-1")
        date, given = environ["HTTP_X_AMZ_DATE"], parts["Signature"]
    request.context["timestamp"] = date
    wanted = auth.signature(auth.string_to_sign(request, auth.canonical_request(request)), request)
    return "" if hmac.compare_digest(wanted, given) else "SignatureDoesNotMatch"


def _wsgi(header: str) -> str:
    name = header.upper().replace("-", "_")
    return name if name in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{name}"
