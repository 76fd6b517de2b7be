"""A small Linux guest with two RDMA devices in software (Soft-RoCE), each on a network interface of its own, with NIXL
and ibverbs.

Beside QEMU it needs Debian's generic kernel, as the cloud kernel has no rdma_rxe, and the library of its provider. They
are looked for in out/rdma-kernel; there, unpacked, not installed:

    apt-get download linux-image-6.1.0-NN-amd64 ibverbs-providers && for each: dpkg -x *.deb out/rdma-kernel
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from penstock.extras import missing_modules
from penstock.pool.net.one_sided_agent import RDMA_TRANSPORTS
from tests.io.guest_tests import GuestKind, pytest_command
from tests.io.qemu_guest import (
    REPOSITORY,
    GuestError,
    Machine,
    libraries,
    missing_qemu,
    newest,
    run_guest,
)
from tests.rdma.verbs_node import DEVICES

ROOT = REPOSITORY / "out" / "rdma-kernel"
MODULES = ("crc32_generic", "ib_core", "ib_uverbs", "udp_tunnel", "ip6_udp_tunnel", "rdma_rxe", "dummy")  # in order
PROVIDER = Path("usr/lib/x86_64-linux-gnu/libibverbs/librxe-rdmav34.so")
TOOLS = ("ip", "rdma")
TIMEOUT_S = 280.0
FILES = (REPOSITORY / "penstock", REPOSITORY / "tests")
SETUP = (
    ("/bin/ip", "link", "set", "lo", "up"),
    ("/bin/ip", "link", "add", "dummy1", "type", "dummy"),
    *(
        command
        for number, device in enumerate(DEVICES)
        for command in (
            ("/bin/ip", "link", "set", f"dummy{number}", "mtu", "9000"),
            ("/bin/ip", "addr", "add", f"10.0.{number}.1/24", "dev", f"dummy{number}"),
            ("/bin/ip", "link", "set", f"dummy{number}", "up"),
            ("/bin/rdma", "link", "add", device, "type", "rxe", "netdev", f"dummy{number}"),
        )
    ),
)
# Queues of UCX that suit emulated processors: as long as usual they take most of the guest's memory and time.
UCX = {
    "UCX_RC_VERBS_RX_QUEUE_LEN": "64", "UCX_RC_VERBS_TX_QUEUE_LEN": "64", "UCX_UD_VERBS_RX_QUEUE_LEN": "128",
    "UCX_RC_TIMEOUT": "1s", "UCX_RC_RETRY_COUNT": "3", "UCX_RCACHE_ENABLE": "n",
}  # fmt: skip


def missing_rdma() -> str | None:
    """Why no guest with RDMA can be run here; None when one can."""
    if reason := missing_qemu():
        return reason
    for kind in RDMA_TRANSPORTS:
        if missing_modules(kind):
            return f"the {kind} extra is not installed"
    if kernel() is None or any(_module(name) is None for name in MODULES):
        return f"needs a generic kernel with rdma_rxe in {ROOT} (Debian: linux-image-*-amd64)"
    if not (ROOT / PROVIDER).exists():
        return f"needs librxe in {ROOT} (Debian: ibverbs-providers)"
    absent = [name for name in TOOLS if shutil.which(name) is None]
    return f"needs {', '.join(absent)} (Debian: iproute2)" if absent else None


def kernel() -> Path | None:
    """The newest generic kernel's image."""
    return newest((ROOT / "boot").glob("vmlinuz-*-amd64"))


def _module(name: str) -> Path | None:
    return next((ROOT / "lib" / "modules").rglob(f"{name}.ko"), None)


def machine() -> Machine:
    """The guest: `missing_rdma` must have said None."""
    image = kernel()
    modules = [path for name in MODULES if (path := _module(name)) is not None]
    assert image is not None and len(modules) == len(MODULES)
    contents = {**_nixl(), **_ibverbs()}
    tools = [Path(str(shutil.which(name))) for name in TOOLS]
    contents.update({f"/bin/{path.name}": path for path in tools})
    for place in ("/usr/lib/x86_64-linux-gnu/libibverbs", "/usr/lib64/libibverbs"):
        contents[f"{place}/{PROVIDER.name}"] = ROOT / PROVIDER
    contents["/etc/libibverbs.d/rxe.driver"] = ROOT / "etc/libibverbs.d/rxe.driver"
    contents.update(libraries([*tools, ROOT / PROVIDER]))
    # The provider asks for NIXL's libibverbs by its usual name, and must find the same file.
    library = next(place for place in contents if "nixl_cu12.libs/libibverbs" in place)
    links = {"/verbs/libibverbs.so.1": library}
    environment = {"LD_LIBRARY_PATH": f"/verbs:/lib:{Path(library).parent}", **UCX}
    return Machine(image, modules, contents, links, SETUP, environment, 2048)


def _nixl() -> dict[str, Path]:
    """NIXL with its plug-in for UCX, and what these need, by their places in the guest. Its other files are large."""
    found = find_spec("nixl_cu12")
    assert found is not None and found.origin is not None
    site = Path(found.origin).parent.parent
    wheel, built = site / "nixl_cu12.libs", site / ".nixl_cu12.mesonpy.libs"
    files = [path for path in (site / "nixl_cu12").iterdir() if path.is_file()]
    needed = [
        wheel / "nixl" / "libplugin_UCX.so",
        *(path for name in ("libuct_ib.so*", "libuct_cma.so*") for path in (wheel / "ucx").glob(name)),
        *built.glob("*.so"),
        built / "plugins" / "libplugin_UCX.so",
    ]
    files += [path for path in needed if path.exists()]
    contents = {f"/guest/site/{path.relative_to(site)}": path for path in files}
    for path in _linked([path for path in files if ".so" in path.name], built):
        if path.is_relative_to(site):
            contents[f"/guest/site/{path.relative_to(site)}"] = path
        else:
            contents[f"/lib/{path.name}"] = path
    return contents


def _ibverbs() -> dict[str, Path]:
    """The package by the places of its files in the guest; it opens NIXL's libibverbs."""
    found = find_spec("ibverbs")
    assert found is not None and found.origin is not None
    folder = Path(found.origin).parent
    return {f"/guest/site/ibverbs/{path.name}": path for path in folder.iterdir() if path.is_file()}


def _linked(binaries: Sequence[Path], folder: Path) -> Iterator[Path]:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
    said = subprocess.run(["ldd", *map(str, binaries)], capture_output=True, text=True, env=environment).stdout
    for line in said.splitlines():
        if match := re.match(r"\s+(?:\S+ => )?(/\S+) \(0x", line):
            yield Path(os.path.normpath(match[1]))


def _with_rdma(folder: Path, tests: list[str]) -> tuple[str, str]:
    try:
        return run_guest(folder, pytest_command(tests), (), FILES, TIMEOUT_S, machine=machine()), "well"
    except GuestError as error:
        return error.printed, str(error)


RDMA = GuestKind(missing_rdma, _with_rdma)
