"""Which store of files: by the section `[blobs]` of the configuration."""

from __future__ import annotations

import configparser
import datetime
import os
import secrets
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from coordinator.blobs.base import Blobs
from coordinator.blobs.folder import FolderBlobs
from protocol.faults import FaultError

BLOB_FOLDER = "blobs"  # in the state folder, where no other place is named
S3 = "s3://"
_CURES = {
    "NoSuchBucket": "Make the bucket, or correct blobs.url.",
    "InvalidAccessKeyId": "Correct AWS_ACCESS_KEY_ID, or the file blobs.credentials.",
    "SignatureDoesNotMatch": "Correct AWS_SECRET_ACCESS_KEY, or the file blobs.credentials, and the region.",
    "AccessDenied": "Allow this key to get, put, delete and list objects below the prefix.",
    "AuthorizationHeaderMalformed": "Correct blobs.region.",
    "PermanentRedirect": "Correct blobs.region and blobs.endpoint.",
    "RequestTimeTooSkewed": "Set this machine's clock.",
}
_NAMES = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")


class BlobsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section `[blobs]`; without it files lie in the state folder.

    Attributes:
        url: s3://BUCKET or s3://BUCKET/PREFIX, or the path of a folder, which all replicas share.
        endpoint: http(s)://HOST of a store other than Amazon's; workers must reach it, too.
        region: of the bucket.
        credentials: a file as ~/.aws/credentials is one, with the section [default]; "" means the environment
            (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN) or the machine's role.
        virtual_hosted: the bucket is a part of the host's name; None means: where no endpoint is given.
    """

    url: str = ""
    endpoint: str = ""
    region: str = ""
    credentials: str = ""
    virtual_hosted: bool | None = None


class BlobsRefusal(Exception):
    """The store of files cannot be used like this; the sentence names the cure. No secret is in it."""


def open_blobs(config: BlobsConfig, state: Path) -> Blobs:
    """Open the store, and try it. Blocks.

    Args:
        state: where files lie when the section names no place, and where uploads are received.

    Raises:
        BlobsRefusal, OSError, ValueError.
    """
    if config.url.startswith(S3):
        return _open_s3(config, state / "drafts")
    if "://" in config.url or (not config.url and config != BlobsConfig()):
        raise BlobsRefusal("blobs.url: Expected s3://BUCKET/PREFIX, or the path of a folder.")
    return FolderBlobs(Path(config.url) if config.url else state)


def _open_s3(config: BlobsConfig, drafts: Path) -> Blobs:
    place = urlsplit(config.url)
    if not place.netloc or place.query or place.fragment or "@" in place.netloc:
        raise BlobsRefusal("blobs.url: Expected s3://BUCKET or s3://BUCKET/PREFIX, and no credentials in it.")
    end = urlsplit(config.endpoint)
    if config.endpoint and (end.scheme not in ("http", "https") or not end.netloc or "@" in end.netloc):
        raise BlobsRefusal("blobs.endpoint: Expected https://HOST or http://HOST, and no credentials in it.")
    try:
        from obstore.exceptions import BaseError
        from obstore.store import S3Store

        from coordinator.blobs.s3 import S3Blobs
    except ImportError:
        raise BlobsRefusal("blobs.url: S3 needs an extra; run pip install 'bulkhead-worker[s3]'.") from None
    told = (config.region, os.environ.get("AWS_REGION"), os.environ.get("AWS_DEFAULT_REGION"), "us-east-1")
    more: dict[str, Any] = {"region": next(filter(None, told)), **_credentials(config.credentials)}
    if config.endpoint:
        more["endpoint"] = config.endpoint
    hosted = config.virtual_hosted if config.virtual_hosted is not None else not config.endpoint
    try:
        store = S3Store(
            place.netloc,
            prefix=place.path.strip("/") or None,
            virtual_hosted_style_request=hosted,
            client_options={"allow_http": end.scheme == "http", "connect_timeout": "5s", "timeout": "120s"},
            retry_config={"max_retries": 3, "retry_timeout": datetime.timedelta(seconds=20)},
            **more,
        )
        _try(store)
        return S3Blobs(store, drafts)
    except (BaseError, FileNotFoundError) as error:
        raise _refusal(config, error) from None
    except FaultError as error:
        raise BlobsRefusal(f"blobs.url: {config.url} cannot be used: {error.fault.message}") from None


def _try(store: Any) -> None:
    """Write, read, list and delete, so that a missing right shows now and not with the first result."""
    import obstore

    name, word = f"check/start-{secrets.token_hex(8)}", secrets.token_bytes(8)
    obstore.put(store, name, word)
    if bytes(obstore.get(store, name).bytes()) != word:
        raise BlobsRefusal("blobs.url: The store answers with other bytes than were written.")
    next(iter(obstore.list(store, prefix="check")), None)
    obstore.delete(store, name)


def _refusal(config: BlobsConfig, error: BaseException) -> BlobsRefusal:
    from coordinator.blobs.s3 import words

    said = words(error)
    cure = _CURES.get(said, "Look at blobs.endpoint, blobs.region and the credentials.")
    return BlobsRefusal(f"blobs.url: {config.url} cannot be used: {said}. {cure}")


def _credentials(file: str) -> dict[str, str]:
    if not file:
        return {}
    parser = configparser.ConfigParser(interpolation=None)
    try:
        with Path(file).open() as source:
            parser.read_file(source)
        section = parser["default"]
        keys = {name.removeprefix("aws_"): section[name] for name in _NAMES if name in section}
    except OSError as error:
        raise BlobsRefusal(f"blobs.credentials: {file} cannot be read: {error.strerror}.") from None
    except (configparser.Error, KeyError, UnicodeDecodeError):  # their texts quote the file
        raise BlobsRefusal(f"blobs.credentials: {file} is no file with a section [default] of KEY = VALUE.") from None
    if not {"access_key_id", "secret_access_key"} <= keys.keys():
        raise BlobsRefusal(f"blobs.credentials: {file} lacks aws_access_key_id or aws_secret_access_key.")
    return keys
