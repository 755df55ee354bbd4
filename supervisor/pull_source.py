"""What a user names when he pulls: a path, an https URL, a Hugging Face repository or a known model."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from supervisor.errors import ExitCode, SupervisorError
from supervisor.known_models import Known, near
from supervisor.pull_fetch import is_loopback
from supervisor.pull_wire import Request

_REPO = re.compile(r"(?:hf:)?(?P<repo>[\w.-]+/[\w.-]+(?:@[\w./-]+?)?)(?::(?P<file>.+))?\Z")
_HUB_PAGE = re.compile(
    r"https://(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<repo>[\w.-]+/[\w.-]+)"
    r"(?:/(?:blob|resolve|tree)/(?P<revision>[^/?#]+)(?:/(?P<file>[^?#]+))?)?/?(?:[?#].*)?\Z"
)
_FILE_ENDINGS = (".gguf", ".onnx", ".bin")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}\Z")


class PullError(SupervisorError):
    """The command cannot do what was asked; the text is a sentence with the cure."""

    exit_code = ExitCode.FAILED


def read_source(source: str, file: str, sha256: str) -> Request:
    """Tell what kind of source a user named; `staging` is still empty.

    Raises:
        PullError: it is none, or the digest it needs is missing.
    """
    if not source:
        raise PullError("SOURCE: expected a file, a folder, an https URL, a Hugging Face repository or a known model.")
    if sha256 and not _SHA256.match(sha256):
        raise PullError("--sha256: expected 64 hexadecimal digits.")
    digest = sha256.lower()
    path = Path(source).expanduser()
    if path.exists():
        return Request(kind="local", source=str(path.absolute()), staging="", sha256=digest)
    if page := _HUB_PAGE.match(source):
        repo = page["repo"] + (f"@{page['revision']}" if page["revision"] else "")
        return Request(kind="hub", source=repo, file=file or page["file"] or "", staging="", sha256=digest)
    if source.startswith(("https://", "http://")):
        if source.startswith("http://"):
            _check_plain(source, digest)
        return Request(kind="url", source=source, staging="", sha256=digest)
    repo_ = _REPO.match(source)
    # `models/my.gguf` that is not there is a misspelt path, not the repository `my.gguf` of the user `models`.
    looks_like_a_path = source[0] in "./~" or (":" not in source and source.lower().endswith(_FILE_ENDINGS))
    if repo_ and not looks_like_a_path:
        return Request(kind="hub", source=repo_["repo"], file=file or repo_["file"] or "", staging="", sha256=digest)
    raise PullError(
        f"{source}: no such file or folder, and no https URL or Hugging Face repository (owner/repo) either."
    )


def _check_plain(url: str, sha256: str) -> None:
    host = url.removeprefix("http://").split("/")[0].rpartition("@")[2]
    bare = host.split("]")[0].lstrip("[") if host.startswith("[") else host.split(":")[0]
    if not is_loopback(bare):
        raise PullError(f"{url}: http is not encrypted; use https (http is for this machine's own servers only).")
    if not sha256:
        raise PullError(f"{url}: http needs --sha256, since nothing else would notice another file.")


def read_known(name: str, known: Known, file: str, sha256: str) -> Request:
    """The request for a known model; `file` and `sha256` of the command line are stronger than the catalogue's.

    Raises:
        PullError: the catalogue names a source that is none.
    """
    try:
        # Another file than the catalogue's has another digest.
        digest = sha256 or ("" if file and file != known.file else known.sha256)
        request = read_source(known.source, file or known.file, digest)
    except PullError as error:
        raise PullError(f"{name}: its source in the catalogue: {error}") from None
    said_by = "--sha256" if sha256 else "the catalogue"
    request = msgspec.structs.replace(request, said_by=said_by)
    if known.revision and request.kind == "hub" and "@" not in request.source:
        return msgspec.structs.replace(request, source=f"{request.source}@{known.revision}")
    return request


def unknown_word(source: str, known: dict[str, Known]) -> str:
    """More for the sentence when a word is no source of any kind: a known model that may be meant."""
    if "/" in source or not source:
        return ""
    name = near(known, source)
    return f" Did you mean the known model {name}?" if name else " `supervisor models search` shows the known models."


def plain_source(request: Request) -> str:
    """The source without what may be secret: the user part and the query of a URL."""
    if request.kind != "url":
        return request.source
    parts = urlsplit(request.source)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def default_name(request: Request) -> str:
    """A public name from the source: the file's stem, or the repository's name."""
    if request.kind == "hub" and not request.file:
        name = request.source.split("@")[0].split("/")[1]
    elif request.kind == "hub":
        name = Path(request.file).name if "." in request.file else request.source.split("@")[0].split("/")[1]
    else:
        name = Path(request.source.split("?")[0].rstrip("/")).name
    name = re.sub(r"-\d{5}-of-\d{5}(?=\.gguf$)", "", name)
    name = re.sub(r"\.(gguf|onnx|bin)$", "", name, flags=re.IGNORECASE)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"


def folder_name(name: str) -> str:
    """A folder for a public name, which may hold slashes and more. Raises PullError for a name like `..`.

    It never begins with a dot: those folders are the store's own.
    """
    folder = re.sub(r"^\.|[^A-Za-z0-9._-]", "--", name)
    if not name.strip("."):
        raise PullError(f"--name: {name!r} cannot name a folder.")
    return folder
