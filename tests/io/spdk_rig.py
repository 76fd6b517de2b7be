"""An SPDK for tests: the stand-in of `spdk_standin`, or the real one that PENSTOCK_SPDK_PKG_CONFIG_PATH names.

One of the two per process, as SPDK's environment starts once. A real one serves memory disks over NVMe/TCP from
`nvmf_tgt`, which lies beside it; faults are injected into the stand-in only.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import itertools
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from penstock.io.spdk import SpdkEngine, SpdkEnvironment, open_spdk
from penstock.io.spdk.build import build

REAL = os.environ.get("PENSTOCK_SPDK_PKG_CONFIG_PATH")
SOURCES = Path(__file__).parent / "spdk_standin"
BUSES = range(1, 33)
_START_DEADLINE_S = 60.0


@functools.cache
def folder() -> Path:
    """A folder for this process's SPDK, gone at its end."""
    made = tempfile.mkdtemp(prefix="penstock-test-spdk-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


def skip_without_tools() -> None:
    if shutil.which("pkg-config") is None:
        pytest.skip("needs pkg-config")
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("needs a C compiler")


def make_standin(prefix: Path, static: bool = False, cflags: str = "") -> Path:
    """Compile the stand-in into `prefix`; returns its pkg-config folder."""
    skip_without_tools()
    lib = prefix / "lib"
    lib.mkdir(parents=True, exist_ok=True)
    include = f"-I{SOURCES / 'include'}"
    compile_it = ["cc", "-std=gnu11", "-O1", "-g", "-fPIC", "-Wall", "-Werror", include, *cflags.split()]
    source = str(SOURCES / "standin.c")
    if static:
        subprocess.run([*compile_it, "-c", "-o", lib / "standin.o", source], check=True)
        subprocess.run(["ar", "rcs", lib / "libspdk_nvme.a", lib / "standin.o"], check=True)
    else:
        name = f"libspdk_nvme-{os.urandom(4).hex()}.so"  # the loader takes libraries of one name for one library
        soname = f"-Wl,-soname,{name}"
        subprocess.run([*compile_it, "-shared", "-pthread", soname, "-o", lib / name, source], check=True)
        (lib / "libspdk_nvme.so").symlink_to(name)
    for module, libs in (("spdk_nvme", f"-L{lib} -lspdk_nvme"), ("spdk_env_dpdk", "")):
        text = f"Name: {module}\nDescription: stand-in\nVersion: 1\nCflags: {include} {cflags}\nLibs: {libs}\n"
        (lib / f"{module}.pc").write_text(text)
    return lib


@dataclass(frozen=True)
class Drive:
    """One drive of the stand-in, over a file."""

    standin: StandIn
    key: str
    target: str
    path: Path

    def set(self, name: str, value: int = 1) -> None:
        self.standin.library.standin_set(self.key.encode(), name.encode(), value)

    def get(self, name: str) -> int:
        return int(self.standin.library.standin_get(self.key.encode(), name.encode()))

    def until(self, name: str, at_least: int) -> None:
        """Wait until a count of the drive has come so far."""
        deadline_s = time.monotonic() + 20
        while self.get(name) < at_least:
            assert time.monotonic() < deadline_s, f"{name} is {self.get(name)}, not {at_least}"
            time.sleep(0.001)

    def open(self, depth: int = 8, capacity_bytes: int | None = None, cpu: int | None = None) -> SpdkEngine:
        size_bytes = self.path.stat().st_size if capacity_bytes is None else capacity_bytes
        return open_spdk(self.target, 1, size_bytes, depth, self.standin.shim, cpu, self.standin.environment)


class StandIn:
    """The stand-in SPDK, and the shim built against it, loaded into this process."""

    environment = SpdkEnvironment(pci_allowed=tuple(f"0000:{bus:02x}:00.0" for bus in BUSES),
                                  hugepage_single_segments=True)  # fmt: skip

    def __init__(self) -> None:
        pkg_config = make_standin(folder() / "standin")
        self.shim = build(pkg_config, out=folder() / "shim.so").path
        self.library = ctypes.CDLL(str(pkg_config / "libspdk_nvme.so"))
        self.library.standin_drive.argtypes = (
            ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint32,
        )  # fmt: skip
        self.library.standin_set.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_long)
        self.library.standin_set.restype = None
        self.library.standin_get.argtypes = (ctypes.c_char_p, ctypes.c_char_p)
        self.library.standin_get.restype = ctypes.c_long
        self.library.standin_offence.restype = ctypes.c_char_p
        self.library.standin_environment.restype = ctypes.c_char_p
        self._numbers = itertools.count()

    def drive(
        self,
        transport: str = "TCP",
        size_bytes: int = 8 << 20,
        lba_bytes: int = 512,
        transfer_bytes: int = 128 << 10,
        metadata_bytes: int = 0,
    ) -> Drive:
        number = next(self._numbers)
        path = folder() / f"disk{number}"
        with path.open("wb") as file:
            file.truncate(size_bytes)
        if transport == "PCIE":
            key = target = f"0000:{BUSES[number % len(BUSES)]:02x}:00.0"
        else:
            key = f"nqn.test:{number}"
            target = f"trtype:{transport} adrfam:IPv4 traddr:127.0.0.1 trsvcid:4420 subnqn:{key}"
        self.library.standin_drive(key.encode(), os.fsencode(path), size_bytes, lba_bytes, transfer_bytes,
                                   metadata_bytes)  # fmt: skip
        return Drive(self, key, target, path)

    def set_global(self, name: str, value: int) -> None:
        self.library.standin_set(b"", name.encode(), value)

    def dma_regions(self, registered: bool) -> int:
        return int(self.library.standin_dma_regions(int(registered)))

    def offence(self) -> str:
        return str(self.library.standin_offence().decode())


@functools.cache
def standin() -> StandIn:
    """The stand-in, started at first use. Skips with the reason where it cannot be had."""
    if REAL:
        pytest.skip("faults are injected into the stand-in, and this run uses a real SPDK")
    return StandIn()


class RealSpdk:
    """`nvmf_tgt` of the real SPDK as a process of its own, and the shim built against the same SPDK."""

    def __init__(self, pkg_config: Path) -> None:
        prefix = pkg_config.parent.parent
        found = [path for path in (prefix / "bin/nvmf_tgt", prefix.parent / "build/bin/nvmf_tgt") if path.exists()]
        if not found:
            pytest.skip(f"a real SPDK is there, but no nvmf_tgt in {prefix}/bin to serve a disk")
        self.shim = build(pkg_config, out=folder() / "shim.so").path
        self._socket = folder() / "rpc"
        self._ids = itertools.count(1)
        self._log = (folder() / "target.log").open("wb")
        self.process = subprocess.Popen(
            [str(found[0]), "--no-huge", "-s", "1024", "--no-pci", "-m", f"[{max(os.sched_getaffinity(0))}]",
             "-r", str(self._socket)],
            stdout=self._log, stderr=self._log, env={**os.environ, "LD_LIBRARY_PATH": str(prefix / "lib")},
        )  # fmt: skip
        atexit.register(self.process.kill)
        deadline_s = time.monotonic() + _START_DEADLINE_S
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline_s:
                pytest.skip(f"nvmf_tgt did not start: {(folder() / 'target.log').read_text()[-300:]}")
            time.sleep(0.05)
        self._call("nvmf_create_transport", trtype="TCP")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]

    def _answers(self) -> bool:
        try:
            self._call("framework_wait_init")
        except (OSError, ValueError):
            return False
        return True

    def _call(self, method: str, **params: object) -> object:
        request = {"jsonrpc": "2.0", "id": next(self._ids), "method": method}
        if params:
            request["params"] = params
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(str(self._socket))
            connection.sendall(json.dumps(request).encode())
            answer = b""
            while True:
                answer += connection.recv(1 << 16)
                try:
                    found = json.loads(answer)
                    break
                except ValueError:
                    continue
        assert "error" not in found, found
        return found["result"]

    def open(self, capacity_bytes: int, depth: int) -> SpdkEngine:
        number = next(self._ids)
        disk, name = f"disk{number}", f"nqn.2026-01.test.penstock:{number}"
        size_bytes = max(capacity_bytes, 1 << 20)
        self._call("bdev_malloc_create", name=disk, num_blocks=size_bytes // 512, block_size=512)
        self._call("nvmf_create_subsystem", nqn=name, allow_any_host=True)
        self._call("nvmf_subsystem_add_ns", nqn=name, namespace={"bdev_name": disk})
        address = {"trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1", "trsvcid": str(self._port)}
        self._call("nvmf_subsystem_add_listener", nqn=name, listen_address=address)
        target = f"trtype:TCP adrfam:IPv4 traddr:127.0.0.1 trsvcid:{self._port} subnqn:{name}"
        return open_spdk(target, 1, capacity_bytes, depth, self.shim)


@functools.cache
def real() -> RealSpdk:
    if not REAL:
        pytest.skip("no real SPDK: PENSTOCK_SPDK_PKG_CONFIG_PATH does not name one")
    skip_without_tools()
    return RealSpdk(Path(REAL))


def open_one(capacity_bytes: int, depth: int, transport: str = "TCP") -> SpdkEngine:
    """An engine on an empty drive of whichever SPDK this process has."""
    if REAL:
        if transport != "TCP":
            pytest.skip("a real SPDK is tested over TCP here: no drive to spare")
        return real().open(capacity_bytes, depth)
    return standin().drive(transport, capacity_bytes, lba_bytes=512).open(depth)
