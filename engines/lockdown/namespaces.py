"""New user, pid, mount, network, ipc and uts namespaces, and what is prepared inside them."""

from __future__ import annotations

import _socket
import fcntl
import os
import struct

from engines.lockdown import kernel, user

_NEWNS, _NEWUTS, _NEWIPC = 0x00020000, 0x04000000, 0x08000000
_NEWUSER, _NEWPID, _NEWNET = 0x10000000, 0x20000000, 0x40000000
_OTHERS = _NEWNS | _NEWUTS | _NEWIPC | _NEWPID
_SIOCSIFFLAGS = 0x8914
_IFF_UP, _IFF_RUNNING = 1, 0x40
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_PRIVATE = 2, 4, 8, 0x4000, 0x40000
NAMES = ("user", "pid", "proc", "mounts", "net", "ipc")
# Where a host keeps its sockets and its users' files: covered, unless something granted lies below. Before version 9
# Landlock lets anybody connect to a socket whose path can be seen.
COVERED = ("/run", "/var/tmp", "/tmp", "/dev/shm")
# What ordinary programs cannot do without gets a place of its own there, in memory, that ends with the namespace:
# nothing is ever left in the box's. CUDA's and NCCL's shared memory, and multiprocessing's, go to /dev/shm.
PRIVATE = {"/tmp": b"size=256m,nr_inodes=16k,mode=1777", "/dev/shm": b"size=1g,nr_inodes=16k,mode=1777"}


def fork(*, network: bool, verdicts: dict[str, str]) -> int:
    """fork into new namespaces, or, where none are to be had, plainly; writes the verdicts before the fork.

    Returns 0 in the child, which waits until it has its user and group. `network` says whether the child keeps the
    network of the host. A kernel that lets us make a user namespace and then forbids to fill it (as Ubuntu's AppArmor
    profile does) is noticed from outside, while there is still a process that has not entered it.
    """
    private = _OTHERS | (0 if network else _NEWNET)
    names = [name for name in NAMES if name != "net" or not network]
    if network:
        verdicts["net"] = "off"
    failure: OSError | None = None
    for flags in (private | _NEWUSER, private):
        if not flags & _NEWUSER and not user.be_root():
            break  # only root may go without a user namespace
        told = dict.fromkeys(names, "claimed")
        if not flags & _NEWUSER and failure is not None:
            told["user"] = kernel.word(failure)
        verdicts.update(told)
        try:
            return _fork_mapped(flags)
        except OSError as error:
            failure = failure or error
    assert failure is not None
    verdicts.update(dict.fromkeys(names, kernel.word(failure)))
    return os.fork()


def _fork_mapped(flags: int) -> int:
    wait, go = os.pipe()
    try:
        pid = kernel.fork_into(flags)
    except OSError:
        os.close(wait)
        os.close(go)
        raise
    if pid == 0:
        os.close(go)
        if os.read(wait, 1) != b"g":
            os._exit(0)  # the map could not be written: we are given up
        os.close(wait)
        return 0
    os.close(wait)
    try:
        if flags & _NEWUSER:
            uid, gid = os.geteuid(), os.getegid()
            _write(f"/proc/{pid}/setgroups", "deny")
            _write(f"/proc/{pid}/uid_map", f"{uid} {uid} 1")
            _write(f"/proc/{pid}/gid_map", f"{gid} {gid} 1")
        os.write(go, b"g")
    except OSError:
        os.close(go)
        os.waitpid(pid, 0)
        raise
    os.close(go)
    return pid


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def furnish(verdicts: dict[str, str], *, loopback: bool, granted: list[str]) -> list[str]:
    """Inside the new namespaces, as their first process: a /proc of our own, the host's sockets covered, loopback.

    Returns the folders of `PRIVATE` that are now our own.
    """
    try:
        kernel.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE)
        kernel.mount(b"proc", b"/proc", b"proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    except OSError as error:  # a container that covers parts of its /proc forbids a fresh one
        verdicts["proc"] = kernel.word(error)
    verdicts["mounts"], private = _cover(granted)
    if loopback and verdicts.get("net") == "claimed":
        plug = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
        try:
            fcntl.ioctl(plug.fileno(), _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _IFF_UP | _IFF_RUNNING))
        finally:
            plug.close()
    return private


def _cover(granted: list[str]) -> tuple[str, list[str]]:
    paths = [os.path.realpath(path) for path in granted]
    open_: list[str] = []
    private: list[str] = []
    for folder in COVERED:
        if not os.path.isdir(folder):
            continue
        if any(path == folder or path.startswith(folder + "/") for path in paths):
            open_.append(folder)
            continue
        try:
            flags = _MS_NOSUID | _MS_NODEV | (0 if folder in PRIVATE else _MS_NOEXEC)
            kernel.mount(b"none", folder.encode(), b"tmpfs", flags, PRIVATE.get(folder, b"size=4k,mode=0755"))
            if os.listdir(folder):
                open_.append(folder)
            elif folder in PRIVATE:
                private.append(folder)
        except OSError:
            open_.append(folder)
    return f"partial({', '.join(open_)} open)" if open_ else "verified", private
