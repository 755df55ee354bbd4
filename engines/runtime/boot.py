"""First code of the engine's own interpreter: take the pipes, then import.

    python -I boot.py ROOT MODULE [serve|probe|describe|check] [--json] …

ROOT holds the `engines` and `protocol` packages of the supervisor's installation. Only these two packages are
taken from it: ROOT may be a site-packages folder, and its other packages must not leak into this interpreter.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys


def take_descriptors() -> tuple[int, int]:
    """Claim descriptors 0 and 1 for the wire before anything else can print.

    Returns private duplicates (in, out), not inherited by grandchildren. Afterwards fd 0 is /dev/null and fd 1 is
    stderr, so a C library that prints corrupts nothing. llama-cpp-python even re-points fds 0-2 while it loads: of
    frames written to fd 1 meanwhile, 6.7 % vanished; on a private duplicate none did.
    """
    wire_in, wire_out = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return wire_in, wire_out


class _RootFinder:
    """Finds exactly the packages named, below one folder."""

    def __init__(self, root: str, names: tuple[str, ...]) -> None:
        self._root, self._names = root, names

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name not in self._names:
            return None
        folder = os.path.join(self._root, name)
        return importlib.util.spec_from_file_location(
            name, os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
        )


def main() -> None:
    """Entry point."""
    wire = take_descriptors()
    root, module, *rest = sys.argv[1:]
    sys.meta_path.insert(0, _RootFinder(root, ("engines", "protocol")))
    mode = rest[0] if rest and not rest[0].startswith("--") else "serve"
    from engines.runtime import modes

    modes.run(mode, module, rest, *wire)


if __name__ == "__main__":
    main()
