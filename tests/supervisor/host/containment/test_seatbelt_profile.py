"""The profile as text: whole for one engine, then rule by rule. Whether macOS obeys is for a Mac to say."""

from __future__ import annotations

import re

import pytest

from supervisor.host.containment.seatbelt_profile import confined_argv, profile, quoted

POLICY = {
    "layers": ["namespaces"],
    "network": "none",
    "spawns": False,
    "read": ["/proc", '/Users/ann/models/a "quoted" one'],
    "execute": ["/opt/engines/llm"],
    "write": ["/tmp/scratch/7"],
}
LINKS = {"/tmp/scratch/7": "/private/tmp/scratch/7"}
GOLDEN = """\
(version 1)
(deny default)
(import "system.sb")
(allow sysctl-read)
(allow process-info* (target self))
(allow ipc-posix-sem)
; OpenMP runtimes announce themselves in a piece of shared memory
(allow ipc-posix-shm* (ipc-posix-name-regex #"^/__KMP_REGISTERED_LIB_[0-9]+"))
(allow file-read* file-write-data file-ioctl (literal "/dev/null") (literal "/dev/zero"))
(allow file-read* (literal "/dev/random") (literal "/dev/urandom") (literal "/"))
(allow signal (target self))
(allow process-exec*
  (subpath "/opt/engines/llm")
  (subpath "/opt/python"))
(allow file-read* file-map-executable
  (subpath "/Users/ann/models/a \\"quoted\\" one")
  (subpath "/opt/engines/llm")
  (subpath "/opt/python"))
(allow file-read* file-write*
  (subpath "/private/tmp/scratch/7"))
(allow file-read-metadata
  (literal "/")
  (literal "/Users")
  (literal "/Users/ann")
  (literal "/Users/ann/models")
  (literal "/opt")
  (literal "/opt/engines")
  (literal "/private")
  (literal "/private/tmp")
  (literal "/private/tmp/scratch"))
(allow iokit-open (iokit-user-client-class "AGXDeviceUserClient"))
(allow mach-lookup (global-name "com.apple.MTLCompilerService"))
"""


def made(metal: bool = False, **changes: object) -> str:
    return profile(
        POLICY | changes,
        metal=metal,
        launcher=["/opt/python"],
        real=lambda path: LINKS.get(path, path),
        exists=lambda path: path != "/proc",
    )


def test_the_profile_of_a_gpu_engine():
    assert made(metal=True) == GOLDEN


def test_without_a_gpu_neither_the_device_nor_the_compiler_is_granted():
    assert made() == GOLDEN[: GOLDEN.index("(allow iokit-open")]


def test_nothing_is_granted_of_what_nobody_asked_for():
    bare = profile({}, metal=False)
    for word in ("network", "process-fork", "process-exec", "iokit", "mach-lookup", "file-write*", "subpath"):
        assert word not in bare
    assert "(deny default)" in bare


@pytest.mark.parametrize("policy", [{}, POLICY, POLICY | {"network": "unix", "write": []}])
def test_no_rule_about_files_or_programs_stands_without_a_filter(policy):
    """`(allow file-read*)` would be everything."""
    text = profile(policy, metal=True, exists=lambda _path: True)
    for rule in re.findall(r"\(allow [^()]*\)", text):
        assert rule in ("(allow sysctl-read)", "(allow ipc-posix-sem)")


@pytest.mark.parametrize(
    ("network", "wanted"),
    [
        ("none", []),
        ("loopback", ['(local ip "localhost:*")', '(remote ip "localhost:*")']),
        ("unix", ['(allow network-bind network-inbound network-outbound (subpath "/private/tmp/scratch/7"))']),
        ("host", ["(allow network*)", "com.apple.trustd.agent"]),
    ],
)
def test_networks(network: str, wanted: list[str]):
    text = made(network=network)
    assert all(part in text for part in wanted)
    assert ("network" in text) == bool(wanted)


def test_engines_that_start_programs_may_fork_and_signal_their_own():
    text = made(spawns=True)
    assert "(allow process-fork)" in text
    assert "(allow signal (target same-sandbox))" in text
    assert "(target self))\n(allow process-exec" not in text


def test_paths_that_can_be_written_cannot_be_executed():
    text = made()
    for rule in text.split("(allow ")[1:]:
        if "/private/tmp/scratch/7" in rule:
            assert "exec" not in rule.split("\n")[0]


def test_parentheses_are_balanced_whatever_a_path_holds():
    text = made(read=['/a)"(b', "/c\\"], network="unix", spawns=True)
    unquoted = re.sub(r'"(?:\\.|[^"\\])*"', "", text)
    assert unquoted.count("(") == unquoted.count(")")
    assert '"' not in unquoted


def test_quoting():
    assert quoted('/a "b" \\c') == '"/a \\"b\\" \\\\c"'
    assert quoted("/Größe") == '"/Größe"'


@pytest.mark.parametrize("path", ["/a\nb", "/a\x00b", "/a\x1bb"])
def test_control_characters_are_refused(path: str):
    with pytest.raises(ValueError, match="control characters"):
        made(read=[path])


def test_the_program_is_the_systems_own():
    assert confined_argv("(version 1)", ["/bin/a", "b"]) == (
        "/usr/bin/sandbox-exec",
        "-p",
        "(version 1)",
        "--",
        "/bin/a",
        "b",
    )
