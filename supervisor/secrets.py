"""Where secrets come from. They are never written into worker.toml.

A secret has a name, and is looked for in this order; the first place that has it decides, whatever is in the others:

1. `$CREDENTIALS_DIRECTORY/<name>`, a credential of systemd (`LoadCredential=coordinator-token:/etc/…`). Its mode is
   not judged: systemd guards that folder, by an ACL whose mask shows as group permissions in the mode.
2. the file that worker.toml names (`[coordinator] token_file`). Refused when its owner is not this process's user or
   when anybody else can read it: who may read the token may take jobs in this worker's name.
3. an environment variable (`BULKHEAD_TOKEN`). Last, as every child of a careless shell inherits it; the supervisor's
   own children do not, they get a list of variables.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from supervisor.errors import ConfigError

TOKEN = "coordinator-token"
VARIABLES = {TOKEN: "BULKHEAD_TOKEN"}
MAX_BYTES = 65_536  # the longest JWTs have some kilobytes; anything above is the wrong file
_OTHERS = 0o077


def secret(name: str, file: str = "", environ: Mapping[str, str] = os.environ) -> str:
    """Return the secret `name` without white space around it; `file` is what worker.toml names, "" nothing.

    Raises:
        ConfigError: no place has it, or the place that has it is refused.
    """
    credential = _credential(name, environ)
    if credential is not None:
        return _text(credential, f"the credential {name}")
    if file:
        path = Path(file)
        if sentence := judge_file(path, strict=True):
            raise ConfigError([f"{name}: {sentence}"])
        return _text(path, f"{name}: {path}")
    variable = VARIABLES.get(name, "")
    if text := environ.get(variable, "").strip():
        return text
    last = f", nor in ${variable}" if variable else ""
    raise ConfigError([f"there is no {name}: not in $CREDENTIALS_DIRECTORY, not in a file of worker.toml{last}"])


def has_secret(name: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the secret is given outside worker.toml."""
    return _credential(name, environ) is not None or bool(environ.get(VARIABLES.get(name, ""), "").strip())


def judge_file(path: Path, strict: bool = False) -> str:
    """Return why a file of worker.toml is refused as a secret's place, with the cure; "" when it is fine.

    Root may look at the configuration of another user's service: its files belong to that user. Only with `strict`,
    when the secret is to be used, must they be root's own then.
    """
    try:
        found = path.stat()
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    if not stat.S_ISREG(found.st_mode):
        return f"{path} is not a plain file; name the file that holds the token"
    if hasattr(os, "geteuid"):  # Windows has no modes; there the folder of the user is closed to others
        me = os.geteuid()
        if found.st_mode & _OTHERS:
            return f"{path} can be read or written by others than its owner; run: chmod 600 {path}"
        if found.st_uid != me and (strict or me != 0):
            return f"{path} belongs to user {found.st_uid}, not to {me}, who runs this; run: chown {me} {path}"
    if not os.access(path, os.R_OK):
        return f"{path} cannot be read by this user"
    return ""


def _credential(name: str, environ: Mapping[str, str]) -> Path | None:
    folder = environ.get("CREDENTIALS_DIRECTORY", "")
    if not folder:
        return None
    path = Path(folder) / name
    return path if path.is_file() else None


def _text(path: Path, what: str) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError([f"{what} cannot be read: {error.strerror}"]) from None
    if len(data) > MAX_BYTES:
        raise ConfigError([f"{what} has more than {MAX_BYTES} bytes; that is no token"])
    try:
        text = data.decode().strip()
    except UnicodeDecodeError:
        raise ConfigError([f"{what} is not UTF-8 text"]) from None
    if not text:
        raise ConfigError([f"{what} is empty"])
    if not text.isascii() or not text.isprintable() or " " in text:  # it travels in a header of HTTP
        raise ConfigError([f"{what} holds white space or characters that no token has; it must hold the token alone"])
    return text
