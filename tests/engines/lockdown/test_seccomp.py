"""The filter, run instruction by instruction for both machines: what each call gets."""

from __future__ import annotations

import errno
import struct

import pytest

from engines.lockdown import kernel, seccomp

pytestmark = pytest.mark.skipif(not hasattr(kernel, "MACHINE"), reason="Linux only")
PID = 77
ALLOW, KILL = 0x7FFF0000, 0x80000000
X86, ARM = 0xC000003E, 0xC00000B7


def evaluate(code: bytes, arch: int, number: int, args: tuple[int, ...]) -> int:
    """What the kernel's interpreter of classic BPF returns for struct seccomp_data."""
    padded = (*args, *(0,) * (6 - len(args)))
    data = struct.pack("<iIQ6Q", number, arch, 0, *(arg & 2**64 - 1 for arg in padded))
    lines = [struct.unpack_from("<HBBI", code, at) for at in range(0, len(code), 8)]
    at, value = 0, 0
    while True:
        op, yes, no, k = lines[at]
        at += 1
        match op:
            case 0x20:
                (value,) = struct.unpack_from("<I", data, k)
            case 0x54:
                value &= k
            case 0x06:
                return k
            case 0x15:
                at += yes if value == k else no
            case 0x35:
                at += yes if value >= k else no
            case 0x45:
                at += yes if value & k else no
            case _:
                raise AssertionError(op)


@pytest.fixture(params=["x86_64", "aarch64"])
def ask(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """ask(call, args…, network=…): "allowed" or the name of the error."""
    monkeypatch.setattr(kernel, "MACHINE", request.param)
    column = 0 if request.param == "x86_64" else 1

    def found(name: str, *args: int, network: str = "none", alone: bool = False, exposed: bool = False) -> str:
        code = seccomp.program(network=network, own_signals_only=alone, own_schedule_only=exposed, pid=PID)
        number = kernel.NUMBERS[name][column]
        assert number is not None
        result = evaluate(code, (X86, ARM)[column], number, args)
        return "allowed" if result == ALLOW else errno.errorcode[result & 0xFFFF]

    return found


def test_what_no_engine_needs_is_refused(ask):
    for name in ("ptrace", "bpf", "mount", "unshare", "setns", "keyctl", "process_vm_readv", "pidfd_getfd", "reboot"):
        assert ask(name) == "EPERM"
    for name in ("io_uring_setup", "clone3"):
        assert ask(name) == "ENOSYS"


def test_sockets_by_network(ask):
    unix, inet, netlink, stream, datagram, cloexec = 1, 2, 16, 1, 2, 0o2000000
    assert ask("connect") == "EPERM"
    assert ask("connect", network="unix") == "allowed"
    for network in ("none", "unix"):
        assert ask("socket", unix, stream | cloexec, network=network) == "allowed"
        assert ask("socket", unix, datagram, network=network) == "EPERM"
        assert ask("socket", inet, stream, network=network) == "EAFNOSUPPORT"
    for network in ("loopback", "host"):
        assert ask("socket", inet, datagram, network=network) == "allowed"
        assert ask("socket", netlink, stream, network=network) == "EAFNOSUPPORT"


def test_calls_refused_by_their_arguments(ask):
    thread, namespace = 0x3D0F00, 0x10000000
    assert ask("clone", thread) == "allowed"
    assert ask("clone", thread | namespace) == "EPERM"
    assert [ask("prlimit64", pid) for pid in (0, PID, 1)] == ["allowed", "allowed", "EPERM"]
    assert [ask("setpriority", which, who) for which, who in ((0, 0), (0, 1), (1, 0), (2, 0))] == [
        *("allowed", "EPERM", "EPERM", "EPERM"),  # a process, its group, its user
    ]
    assert [ask("ioprio_set", which, who) for which, who in ((1, 0), (1, 5), (2, 0), (3, 0))] == [
        *("allowed", "EPERM", "EPERM", "EPERM"),
    ]
    assert [ask("ioctl", 0, request) for request in (0x5412, 0x541C, 0x5401)] == ["EPERM", "EPERM", "allowed"]


def test_signals_only_to_itself_where_nothing_else_keeps_them_in(ask):
    for name in ("kill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo"):
        assert ask(name, 1) == "allowed"
        assert [ask(name, pid, alone=True) for pid in (PID, 1, -1, 0)] == ["allowed", "EPERM", "EPERM", "EPERM"]
    assert ask("pidfd_send_signal", alone=True) == "EPERM"


def test_the_schedule_of_nobody_else_where_everybody_can_be_named(ask):
    for name in ("sched_setaffinity", "sched_setscheduler", "sched_setparam", "sched_setattr"):
        assert ask(name, 1) == "allowed"
        assert [ask(name, pid, exposed=True) for pid in (0, PID, 1, PID + 1)] == [
            *("allowed", "allowed", "EPERM", "EPERM"),
        ]


def test_another_machines_calls_kill(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernel, "MACHINE", "x86_64")
    code = seccomp.program(network="none", own_signals_only=False, own_schedule_only=False, pid=PID)
    assert evaluate(code, 0x40000003, 1, ()) == KILL  # i386: its numbers mean other calls
    assert evaluate(code, X86, 0x40000000 | 101, ()) == 0x50000 | errno.ENOSYS  # x32
    assert len(code) // 8 < 300


def test_every_jump_lands_inside(monkeypatch: pytest.MonkeyPatch):
    for machine in ("x86_64", "aarch64"):
        monkeypatch.setattr(kernel, "MACHINE", machine)
        for network in ("none", "unix", "loopback", "host"):
            code = seccomp.program(network=network, own_signals_only=True, own_schedule_only=True, pid=PID)
            count = len(code) // 8
            for at in range(count):
                op, yes, no, _ = struct.unpack_from("<HBBI", code, at * 8)
                if op in (0x15, 0x35, 0x45):
                    assert at + 1 + max(yes, no) < count
