"""How commands of `coordinator` ask one that serves, over HTTP."""

from __future__ import annotations

import argparse
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from coordinator import config as configuration

KEY_VARIABLE = "COORDINATOR_KEY"
KEY_FILE = "client.key"
ANSWER_S = 30.0


class AskError(Exception):
    """The coordinator cannot be asked, or has refused; the sentence says which."""


def asking(parser: type[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """The options of every command that asks."""
    options = parser(add_help=False)
    options.add_argument("--url", help="of the coordinator; default: where coordinator.toml lets it listen")
    options.add_argument("--key-file", type=Path, metavar="FILE", help=f"file with an API key (also {KEY_VARIABLE})")
    options.add_argument("--json", action="store_true", help="print what the coordinator answered")
    return options


def ask(arguments: argparse.Namespace, method: str, path: str, body: Any = None) -> Any:
    """What it answers at `path`, such as /v1/jobs. Raises AskError."""
    settings = configuration.merged(configuration.load(arguments.config), arguments)
    scheme = "https" if settings.tls_cert else "http"
    url = (arguments.url or f"{scheme}://{settings.listen}").rstrip("/").removesuffix("/v1")
    if not url.startswith(("http://", "https://")):
        raise AskError(f"--url: Expected http:// or https://, not {url!r}.")
    key = _key(arguments.key_file, configuration.state_dir(settings))
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{url}{path}", method=method, headers=headers, data=data)
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            raise AskError(_refusal(error)) from None
    except urllib.error.URLError as error:
        raise AskError(f"{url} does not answer: {error.reason}; is it running, and is --url right?") from None
    except (OSError, ValueError) as error:
        raise AskError(f"{url} gave no answer of a coordinator: {error}.") from None


def _key(file: Path | None, state: Path) -> str:
    if file is None and (key := os.environ.get(KEY_VARIABLE, "").strip()):
        return key
    path = file or state / KEY_FILE
    try:
        return path.read_text().strip()
    except OSError as error:
        raise AskError(f"{path}: {error.strerror}; give --key-file, --state or {KEY_VARIABLE}.") from None


def _refusal(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError, OSError):
        return f"The coordinator answered {error.code}."


def quoted(name: str) -> str:
    """A name as one step of a path."""
    return urllib.parse.quote(name, safe="")
