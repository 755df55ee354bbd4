"""Hugging Face repositories: which files a model needs, and where they lie. Used by the pull child only.

huggingface-hub finds the commit, lists the tree with sizes and digests, and holds the token and `HF_ENDPOINT`. The
bytes are fetched by `pull_fetch`: since 2.0 the hub's own download writes to a file name of its own each time and
removes it when interrupted, so a second run would start from zero.
"""

from __future__ import annotations

import fnmatch
import importlib
import re
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any

import msgspec

from supervisor.model_guess import shards
from supervisor.pull_fetch import FetchFailed, Remote, is_loopback

# What no engine here loads. Weights of other frameworks stay out only where an ONNX or CTranslate2 twin exists.
_NEVER = (".gitattributes", ".gitignore", "*.md", "LICENSE*", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.mp4", "*.ipynb")
_FOREIGN = ("*.safetensors", "*.h5", "*.msgpack", "*.ot", "*.pt", "*.pth", "*.ckpt", "pytorch_model*.bin", "*.tflite")
_FOREIGN_FOLDERS = ("openvino", "coreml")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")


class HubFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a repository; `sha256` is "" for the small ones, which git itself keeps."""

    name: str
    size_bytes: int
    sha256: str = ""


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """A repository at one commit, and the files to fetch: relative local name -> where."""

    origin: str
    files: dict[str, Remote]


def look_up(source: str, pattern: str, token: str = "") -> Found:
    """Find the files of `owner/repo[@revision]`.

    Args:
        pattern: a file, a glob, or a part of a name that one model file alone has; "" lets the layout decide.
        token: "" takes HF_TOKEN, HF_TOKEN_PATH or the login of `hf auth login`.

    Raises:
        FetchFailed: not there, gated, unreachable, or the choice is not clear.
    """
    try:
        hub: Any = importlib.import_module("huggingface_hub")
    except ImportError:
        raise FetchFailed("huggingface-hub is not installed: `pip install 'bulkhead-worker[hub]'`.") from None
    repo, _, revision = source.partition("@")
    api = hub.HfApi(token=token or None)
    _check_endpoint(api.endpoint)
    commit, files = _asked(repo, lambda: _list(api, repo, revision or None))
    chosen = choose(files, pattern, repo)
    headers = {name: value for name, value in api._build_hf_headers().items() if name.lower() == "authorization"}
    flat = _is_flat(chosen)
    return Found(
        origin=f"{repo}@{commit}",
        files={
            PurePosixPath(file.name).name if flat else file.name: Remote(
                url=hub.hf_hub_url(repo, file.name, revision=commit, endpoint=api.endpoint),
                sha256=file.sha256,
                size_bytes=file.size_bytes,
                headers=headers,
            )
            for file in chosen
        },
    )


def _check_endpoint(endpoint: str) -> None:
    found = re.match(r"(https?)://(\[[^]]*\]|[^:/]+)", endpoint)
    if not found or (found[1] == "http" and not is_loopback(found[2])):
        raise FetchFailed(f"HF_ENDPOINT is {endpoint!r}: expected an https address.")


def _list(api: Any, repo: str, revision: str | None) -> tuple[str, list[HubFile]]:
    commit = str(api.model_info(repo, revision=revision).sha)
    found = []
    for entry in api.list_repo_tree(repo, recursive=True, revision=commit):
        if hasattr(entry, "size"):  # a RepoFile; folders have none
            sha256 = (entry.lfs.sha256 or "") if entry.lfs else ""
            found.append(HubFile(name=entry.path, size_bytes=entry.size, sha256=sha256))
    for file in found:
        if not _is_safe(file.name) or (file.sha256 and not _SHA256.match(file.sha256)):
            raise FetchFailed(f"{repo} has a file with the impossible name or digest {file.name!r}.")
    return commit, found


def _is_safe(name: str) -> bool:
    """The hub's names become paths of ours."""
    return bool(name) and not name.startswith("/") and "\\" not in name and ".." not in name.split("/")


def _asked(repo: str, ask: Callable[[], tuple[str, list[HubFile]]]) -> tuple[str, list[HubFile]]:
    """Translate the hub's errors, the one place for it."""
    errors: Any = importlib.import_module("huggingface_hub.errors")
    try:
        return ask()
    except errors.GatedRepoError:
        raise FetchFailed(
            f"{repo} is gated: accept its terms on its page, then name your token's file with --token-file, or log in"
            " with `hf auth login`, or set HF_TOKEN."
        ) from None
    except errors.RevisionNotFoundError:
        raise FetchFailed(
            f"{repo} has no such revision: it was deleted or rewritten; name another one, or none for what is current."
        ) from None
    except errors.RepositoryNotFoundError:
        raise FetchFailed(
            f"There is no public repository {repo}: check the spelling; for a private one set HF_TOKEN or give"
            " --token-file."
        ) from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        cure = "check the token" if status in (401, 403) else "run the same command again later"
        raise FetchFailed(f"The hub answers {status} for {repo}: {cure}.") from None
    except errors.OfflineModeIsEnabled:
        raise FetchFailed("HF_HUB_OFFLINE is set: unset it to pull from a hub.") from None
    except errors.LocalTokenNotFoundError as error:
        raise FetchFailed(f"The token cannot be used: {' '.join(str(error).split())}") from None
    except FetchFailed:
        raise
    except (errors.HFValidationError, ValueError) as error:
        raise FetchFailed(f"{repo!r} is not a name of a repository: {' '.join(str(error).split())}") from None
    except Exception as error:  # the hub's HTTP library is its own affair and has changed before
        raise FetchFailed(f"The hub cannot be reached: {type(error).__name__}: {error}; check the network.") from None


# ---- choosing ----------------------------------------------------------------------------------------------


def choose(files: Sequence[HubFile], pattern: str, repo: str) -> list[HubFile]:
    """The files to fetch, in the tree's order. Raises FetchFailed when the choice is not clear."""
    named = {file.name: file for file in files}
    if pattern:
        return [named[name] for name in _with_company(_matching(named, pattern, repo), named)]
    ggufs = [name for name in named if name.lower().endswith(".gguf") and "mmproj" not in name.lower()]
    if ggufs:
        return [named[name] for name in _with_company(_only(_first_shards(ggufs), repo), named)]
    kept = [name for name in named if not _matches(PurePosixPath(name).name, _NEVER)]
    if any(name.endswith(".onnx") or name == "model.bin" for name in kept):
        kept = [name for name in kept if not _is_foreign(name)]
    if not kept:
        raise FetchFailed(f"{repo} holds no model file.")
    return [named[name] for name in kept]


def _matching(named: dict[str, HubFile], pattern: str, repo: str) -> str:
    if pattern in named:
        return pattern
    found = [name for name in named if fnmatch.fnmatch(name, pattern)]
    if not found:
        found = [name for name in named if pattern.lower() in name.lower() and name.endswith((".gguf", ".onnx"))]
    if not found:
        raise FetchFailed(f"{repo} has no file {pattern!r}; it has {_some(sorted(named))}.")
    return _only(_first_shards(found), repo)


def _only(names: Sequence[str], repo: str) -> str:
    if len(names) == 1:
        return names[0]
    raise FetchFailed(f"{repo} has several models; name one with --file: {_some(sorted(names))}.")


def _first_shards(names: Sequence[str]) -> list[str]:
    """A split GGUF counts once, by its first part."""
    return [name for name in names if shards(name)[0] == name]


def _with_company(name: str, named: dict[str, HubFile]) -> list[str]:
    """A file and those it cannot be without: the other parts of a split GGUF, the .json of a voice."""
    company = [*shards(name), *([f"{name}.json"] if f"{name}.json" in named else [])]
    missing = [other for other in company if other not in named]
    if missing:
        raise FetchFailed(f"The repository lacks {missing[0]}, a part of {name}.")
    return company


def _is_flat(chosen: Sequence[HubFile]) -> bool:
    """One model file, with its company, loses the repository's folders; a whole layout keeps them."""
    first = chosen[0].name
    return all(file.name in (*shards(first), f"{first}.json") for file in chosen)


def _is_foreign(name: str) -> bool:
    return _matches(PurePosixPath(name).name, _FOREIGN) or name.split("/")[0] in _FOREIGN_FOLDERS


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:12])
    return shown + (f" and {len(names) - 12} more" if len(names) > 12 else "")
