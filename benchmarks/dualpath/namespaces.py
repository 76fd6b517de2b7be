"""Network namespaces as hosts, veth pairs as NICs of a stated speed: nothing of them outlives the process.

The namespaces have no names: they exist as long as a file descriptor of this process or a process inside refers to
them. After that the kernel removes them with their NICs and queues, however the process ended. Needs root, `ip` and
`tc`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from typing import Self

COMMAND_S_MAX = 20.0
BURST_BYTES = 256 << 10  # more than the largest packet on a veth (64 KiB)
QUEUE_BYTES, QUEUE_PACKETS = 4 << 20, 128
MTU = "9000"
_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)


class NamespaceError(RuntimeError):
    """A set-up step failed; the message has the step and the system's error."""


def why_not() -> str | None:
    """Why namespaces are not available here, in one line; None if they are."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed (package iproute2)"
    try:
        with Namespace() as one, Namespace() as other:
            connect(one, "nic", "10.0.0.1/30", other, "nic", "10.0.0.2/30", 1e9)
    except (NamespaceError, OSError) as error:
        return f"network namespaces cannot be set up: {error}"
    return None


def _open_own() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _enter(fd: int) -> None:
    if _LIBC.setns(fd, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"setns: {os.strerror(ctypes.get_errno())}")


class Namespace:
    """A host with its own network. Use as a context manager; processes started and sockets opened while it is `entered`
    are inside and remain there."""

    def __init__(self) -> None:
        self._fd = -1

    def __enter__(self) -> Self:
        before = _open_own()
        try:
            if _LIBC.unshare(_CLONE_NEWNET):
                raise NamespaceError(f"unshare: {os.strerror(ctypes.get_errno())}")
            self._fd = _open_own()
        finally:
            _enter(before)
            os.close(before)
        try:
            self.run("ip", "link", "set", "lo", "up")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the namespace; it disappears when no process is inside any more. May be called again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def path(self) -> str:
        """A path for other processes while this one holds the namespace: `nsenter --net=PATH`."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """A context in which the calling thread (only) is inside."""
        before = _open_own()
        try:
            _enter(self._fd)
            try:
                yield
            finally:
                _enter(before)
        finally:
            os.close(before)

    def run(self, *command: str) -> str:
        """Run a command inside; returns its output. Raises NamespaceError."""
        with self.entered():
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S_MAX, check=False)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise NamespaceError(f"{' '.join(command)}: {error}") from error
        if done.returncode:
            raise NamespaceError(f"{' '.join(command)}: {' '.join(done.stderr.split())}")
        return done.stdout

    def listen(self, address: str, port: int = 0) -> socket.socket:
        """A bound TCP socket inside."""
        with self.entered():
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind((address, port))
            except BaseException:
                sock.close()
                raise
        return sock


def connect(
    local: Namespace,
    local_name: str,
    local_address: str,
    remote: Namespace,
    remote_name: str,
    remote_address: str,
    bytes_per_s: float,
) -> None:
    """A veth pair between two namespaces, both directions at `bytes_per_s`. Addresses are ADDRESS/BITS; an empty
    address leaves that end without one (the port of a switch)."""
    local.run(
        "ip",
        "link",
        "add",
        local_name,
        "mtu",
        MTU,
        "type",
        "veth",
        "peer",
        "name",
        remote_name,
        "mtu",
        MTU,
        "netns",
        remote.path,
    )
    for namespace, name, address in ((local, local_name, local_address), (remote, remote_name, remote_address)):
        if address:
            namespace.run("ip", "addr", "add", address, "dev", name)
        namespace.run("ip", "link", "set", name, "up")
        set_speed(namespace, name, bytes_per_s)


def set_speed(namespace: Namespace, nic: str, bytes_per_s: float) -> None:
    """Limit what leaves through this NIC to this rate, with the sockets' priorities (`transport.lanes`)."""
    rate = f"{round(bytes_per_s * 8)}bit"
    namespace.run("ip", "link", "set", nic, "txqueuelen", str(QUEUE_PACKETS))
    tc = ("tc", "qdisc", "replace", "dev", nic)
    namespace.run(
        *tc, "root", "handle", "1:", "tbf", "rate", rate, "burst", str(BURST_BYTES), "limit", str(QUEUE_BYTES)
    )
    namespace.run(*tc, "parent", "1:1", "handle", "10:", "pfifo_fast")


def switch(namespace: Namespace, ports: list[str]) -> None:
    """Join NICs of one namespace into a switch."""
    namespace.run("ip", "link", "add", "switch", "type", "bridge")
    namespace.run("ip", "link", "set", "switch", "up")
    for port in ports:
        namespace.run("ip", "link", "set", port, "master", "switch")


def received_bytes(pid: int | None, nic: str) -> int:
    """Bytes received by a NIC of the namespace that process is in; None: the namespace that the calling thread has
    entered."""
    with open(f"/proc/{pid}/net/dev" if pid is not None else "/proc/thread-self/net/dev") as lines:
        for line in lines:
            name, colon, numbers = line.partition(":")
            if colon and name.strip() == nic:
                return int(numbers.split()[0])
    raise NamespaceError(f"{f'process {pid}' if pid is not None else 'this thread'} has no NIC {nic}")
