"""`supervisor ui`: ask the running supervisor for a one-time code, and open the page with it.

The code stands in the address, behind the `#`, and so on the browser's command line for a moment, where other users of
this machine may read it. It works once and for a minute; where even that is too much, `--print` hands it to the
terminal alone. Exit codes: as those of `supervisor status`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from supervisor.control.client import ask
from supervisor.errors import ExitCode

EXAMPLES = """\
examples:
  supervisor ui          open the page in the browser
  supervisor ui --print  print its address, good for one session, for a minute
  ssh -L 4711:127.0.0.1:4711 box
                         from elsewhere, with [page] port = 4711;
                         then `supervisor ui --print` there

The page is off until worker.toml says:
  [page]
  enabled = true
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    parser.add_argument("--config", metavar="FILE", help="worker.toml of the supervisor that is meant")
    parser.add_argument("--print", dest="only_print", action="store_true", help="print the address, open nothing")
    parser.add_argument("--json", action="store_true", help="for programs: the address, and nothing is opened")
    parser.set_defaults(command=main)


def main(arguments: argparse.Namespace) -> int:
    """Open or print it. Raises as `supervisor.control.client.ask`."""
    url = str(ask(_socket(arguments.config), "POST", "/v1/login-code", {})["url"])
    page = url.partition("#")[0]
    if arguments.json:
        sys.stdout.write(json.dumps({"url": url}) + "\n")
    elif arguments.only_print or not has_screen():
        sys.stdout.write(f"{url}\n")
    elif _opened(url):
        sys.stdout.write(f"Opened {page} in your browser.\n")
    else:
        sys.stdout.write(f"No browser could be opened; within a minute, open this in one:\n{url}\n")
    return int(ExitCode.STOPPED)


def has_screen(environ: Mapping[str, str] = os.environ, platform: str = sys.platform) -> bool:
    """Whether a browser would be seen: without this question a text browser would take over the terminal."""
    if platform in ("win32", "darwin"):
        return "SSH_CONNECTION" not in environ
    return bool(environ.get("DISPLAY") or environ.get("WAYLAND_DISPLAY"))


def _opened(url: str) -> bool:
    import webbrowser

    try:
        return webbrowser.open(url, new=2)
    except (webbrowser.Error, OSError):
        return False


def _socket(config: str | None) -> Path:
    from supervisor.control.commands.place import socket_path

    return socket_path(config)
