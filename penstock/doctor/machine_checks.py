"""Checks of what this machine offers and what is misconfigured on it."""

from __future__ import annotations

import os
import re
import resource
import socket
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files

from penstock.doctor.check import Check
from penstock.doctor.machine import Machine
from penstock.doctor.rdma_checks import check_gpu_direct, check_one_sided_reads
from penstock.extras import EXTRAS, missing_modules

MIB, GIB = 1 << 20, 1 << 30
OPEN_FILES_MIN = 4096
SHARED_MEMORY_MIN_BYTES = GIB
SOCKET_BUFFER_MIN_BYTES = 4 * MIB
STAGING_MIN_BYTES = GIB
CAP_IPC_LOCK = 14


def _size(size_bytes: float) -> str:
    return f"{size_bytes / GIB:.1f} GiB" if size_bytes >= GIB else f"{size_bytes / MIB:.1f} MiB"


def check_python(machine: Machine) -> Check:
    """Python's version and the platform."""
    found = f"Python {sys.version.split()[0]} on {sys.platform}; block keys do not depend on PYTHONHASHSEED"
    if sys.version_info < (3, 11) or sys.platform != "linux":
        return Check("python", "problem", found, "use Python 3.11 or later on Linux", unusable=True)
    return Check("python", "ok", found)


def tested_versions() -> dict[str, str]:
    """Package -> the version that Penstock was tested with."""
    lines = (files("penstock") / "tested_versions.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def check_packages(machine: Machine) -> Check:
    """The installed versions against those that Penstock was tested with; packages of extras may be missing."""
    tested = tested_versions()
    optional = {name for names in EXTRAS.values() for name in names}
    absent: list[str] = []
    without: list[str] = []
    other: list[str] = []
    for name, wanted in tested.items():
        try:
            have = version(name)
        except PackageNotFoundError:
            (without if name.replace("-", ".") in optional else absent).append(name)
            continue
        if have.split("+")[0] != wanted:
            other.append(f"{name} {have} (tested: {wanted})")
    if absent:
        return Check("packages", "problem", f"missing: {', '.join(absent)}", "install Penstock again", unusable=True)
    if other:
        return Check(
            "packages", "note", f"untested versions: {', '.join(other)}", "install the tested ones if it fails"
        )
    found = f"all {len(tested) - len(without)} packages at their tested versions"
    return Check("packages", "ok", f"{found}; of extras, not installed: {', '.join(without)}" if without else found)


def check_cpus(machine: Machine) -> Check:
    """CPUs that this process may use, including its control group's quota."""
    cpus: float = len(os.sched_getaffinity(0))
    found = f"{cpus} CPUs for this process"
    quota = (machine.text("sys/fs/cgroup/cpu.max") or "max").split()
    if quota[0].isdigit() and int(quota[0]) / int(quota[1]) < cpus:
        cpus = int(quota[0]) / int(quota[1])
        found += f", of which its control group may use {cpus:g}"
    if cpus < 2:
        return Check("cpus", "note", found, "give it two or more; with one, loading and computing share it")
    return Check("cpus", "ok", found)


def check_memory(machine: Machine) -> Check:
    """Memory that is available to this process."""
    fields = machine.meminfo()
    available = fields.get("MemAvailable", 0) << 10
    found = f"{_size(available)} available of {_size(fields.get('MemTotal', 0) << 10)}"
    limit = machine.number("sys/fs/cgroup/memory.max")
    if limit is not None and limit < available:
        available, found = limit, f"{found}; the control group's limit is {_size(limit)}"
    if available < 2 * GIB:
        return Check("memory", "note", found, "staging memory, memory members and the model must fit; free some")
    return Check("memory", "ok", found)


def check_io_uring(machine: Machine) -> Check:
    """Creates a real ring; the sysctl only explains a refusal."""
    from penstock.io.ring import probe

    reason = probe()
    if reason is None:
        return Check("io_uring", "ok", "works: slabs use the uring engine")
    advice = "Penstock uses threads instead, at more CPU per GB"
    disabled = machine.number("proc/sys/kernel/io_uring_disabled")
    if disabled:
        who = "everybody" if disabled == 2 else "users outside the group kernel.io_uring_group"
        reason = f"kernel.io_uring_disabled={disabled} forbids it to {who}"
        advice = f"sysctl -w kernel.io_uring_disabled=0; until then {advice}"
    return Check("io_uring", "problem", reason, advice)


def check_memory_lock(machine: Machine) -> Check:
    """How much memory may be locked, which registered buffers need."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    capabilities = re.search(r"CapEff:\s*([0-9a-f]+)", machine.text("proc/self/status") or "")
    if capabilities and int(capabilities[1], 16) >> CAP_IPC_LOCK & 1:
        return Check("memory lock", "ok", "not limited: this process has CAP_IPC_LOCK")
    if soft == resource.RLIM_INFINITY:
        return Check("memory lock", "ok", "unlimited")
    found = f"{_size(soft)} may be locked; registered buffers need the staging memory's size once per slab"
    if soft >= STAGING_MIN_BYTES:
        return Check("memory lock", "ok", found)
    advice = "ulimit -l unlimited (systemd: LimitMEMLOCK=infinity); until then buffers are pinned at each I/O"
    return Check("memory lock", "note", found, advice)


def check_huge_pages(machine: Machine) -> Check:
    """Transparent huge pages and reserved ones."""
    modes = machine.text("sys/kernel/mm/transparent_hugepage/enabled")
    chosen = re.search(r"\[(\w+)\]", modes or "")
    fields = machine.meminfo()
    reserved = fields.get("HugePages_Total", 0) * fields.get("Hugepagesize", 0) << 10
    found = f"transparent: {chosen[1] if chosen else 'absent'}; reserved: {_size(reserved)}"
    if chosen is None or chosen[1] == "never":
        advice = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled: large direct reads become much faster"
        return Check("huge pages", "note", found, advice)
    return Check("huge pages", "ok", found)


def check_numa(machine: Machine) -> Check:
    """NUMA nodes of this machine."""
    nodes = machine.names("sys/devices/system/node", r"node\d+")
    if len(nodes) <= 1:
        return Check("numa", "ok", "one NUMA node")
    sizes = []
    for node in nodes:
        total = re.search(r"MemTotal:\s*(\d+)", machine.text(f"sys/devices/system/node/{node}/meminfo") or "")
        sizes.append(f"{node} {_size(int(total[1]) << 10)}" if total else node)
    return Check(
        "numa",
        "ok",
        f"{len(nodes)} NUMA nodes: {', '.join(sizes)}",
        "use one memory member per NUMA node, or processes = 'numa'",
    )


def check_nics(machine: Machine) -> Check:
    """Physical and virtual network interfaces that are up, with their speed if the driver reports it."""
    cards, slow = [], []
    for name in machine.names("sys/class/net"):
        base = f"sys/class/net/{name}"
        if machine.number(f"{base}/type") != 1 or machine.text(f"{base}/operstate") not in ("up", "unknown"):
            continue
        speed_mbit = machine.number(f"{base}/speed") or -1
        cards.append(f"{name} ({speed_mbit / 1000:g} Gbit/s)" if speed_mbit > 0 else f"{name} (speed unknown)")
        if 0 < speed_mbit < 10_000:
            slow.append(name)
    if not cards:
        return Check("network", "note", "no network interface is up", "the pool and the engine must share this host")
    if slow:
        advice = f"loading over {', '.join(slow)} is slower than an NVMe drive; expect recomputation to win more often"
        return Check("network", "note", ", ".join(cards), advice)
    return Check("network", "ok", ", ".join(cards))


def check_tcp_buffers(machine: Machine) -> Check:
    """Limits of TCP buffers, which bound one connection's rate."""
    limits = {name: machine.number(f"proc/sys/net/core/{name}") for name in ("rmem_max", "wmem_max")}
    automatic = {}
    for name in ("tcp_rmem", "tcp_wmem"):
        parts = (machine.text(f"proc/sys/net/ipv4/{name}") or "").split()
        automatic[name] = int(parts[2]) if len(parts) == 3 else None
    known = {name: value for name, value in (limits | automatic).items() if value is not None}
    if not known:
        return Check("tcp buffers", "note", "the limits cannot be read here", "look at net.core.rmem_max on the host")
    found = ", ".join(f"{name} {_size(value)}" for name, value in known.items())
    small = [name for name, value in known.items() if value < SOCKET_BUFFER_MIN_BYTES]
    if small:
        wanted = " ".join(
            f"net.ipv4.{name}='4096 131072 {16 * MIB}'" if name in automatic else f"net.core.{name}={16 * MIB}"
            for name in small
        )
        return Check("tcp buffers", "note", found, f"for links above 10 Gbit/s: sysctl -w {wanted}")
    return Check("tcp buffers", "ok", found)


def check_cuda(machine: Machine) -> Check:
    """GPUs of the machine, and whether the installed torch can use them."""
    cards = machine.names("dev", r"nvidia\d+")
    if "torch" in missing_modules("engine"):
        found = f"{len(cards) or 'no'} GPU(s), and no torch: pool node, router and simulator need neither"
        advice = "to serve models: pip install 'penstock[engine]'"
        return Check("cuda", "note" if cards else "ok", found, advice if cards else "")
    try:
        import torch
    except Exception as error:  # noqa: BLE001 (a broken torch fails with errors of any kind)
        reason = f"torch cannot be imported: {type(error).__name__}: {error}"
        return Check("cuda", "problem", reason, "install Penstock again", unusable=True)
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
        found = ", ".join(f"{one.name} {_size(one.total_memory)}" for one in names)
        return Check("cuda", "ok", f"{found}; torch {torch.__version__}")
    if not cards:
        return Check("cuda", "ok", f"no GPU here; torch {torch.__version__} computes on the CPU")
    if torch.version.cuda is None:
        advice = "install the CUDA build of the same torch version, see PyTorch's install page"
        return Check("cuda", "problem", f"{len(cards)} GPU(s), but torch {torch.__version__} is a CPU build", advice)
    advice = "compare nvidia-smi's driver version with torch's CUDA version, and CUDA_VISIBLE_DEVICES"
    return Check("cuda", "problem", f"{len(cards)} GPU(s), but torch {torch.__version__} cannot use them", advice)


def check_rdma(machine: Machine) -> Check:
    """RDMA ports and whether they are active."""
    ports = []
    for device in machine.names("sys/class/infiniband"):
        for port in machine.names(f"sys/class/infiniband/{device}/ports"):
            base = f"sys/class/infiniband/{device}/ports/{port}"
            state, rate = machine.text(f"{base}/state") or "?", machine.text(f"{base}/rate") or "?"
            ports.append((f"{device}:{port} {rate}, {state}", "ACTIVE" in state))
    if not ports:
        return Check("rdma", "ok", "no RDMA device; transfers use TCP")
    found = "; ".join(text for text, _ in ports)
    if not any(active for _, active in ports):
        return Check("rdma", "problem", found, "no port is active: check cable, link and subnet manager")
    if not machine.names("dev/infiniband", r"uverbs\d+"):
        return Check("rdma", "problem", f"{found}; no /dev/infiniband/uverbs*", "load ib_uverbs or pass the devices in")
    return Check("rdma", "ok", found)


def check_nvme(machine: Machine) -> Check:
    """NVMe drives, and whether passthrough is possible."""
    drives = []
    for name in machine.names("sys/class/nvme", r"nvme\d+"):
        model = machine.text(f"sys/class/nvme/{name}/model") or "unknown model"
        drives.append(f"{name} ({model})")
    characters = machine.names("dev", r"ng\d+n\d+")
    if not drives:
        return Check("nvme", "ok", "no NVMe drive; slabs work on any filesystem with direct I/O")
    found = f"{', '.join(drives)}; passthrough devices: {', '.join(characters) or 'none'}"
    denied = [name for name in characters if not os.access(machine.root / "dev" / name, os.R_OK | os.W_OK)]
    if denied:
        return Check("nvme", "note", found, f"passthrough needs root: no access to {', '.join(denied)}")
    return Check("nvme", "ok", found)


def check_open_files(machine: Machine) -> Check:
    """Limit of open files, which bounds client connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{soft} open files (up to {hard})"
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES_MIN:
        return Check("open files", "note", found, f"ulimit -n {OPEN_FILES_MIN}: each client connection takes one")
    return Check("open files", "ok", found)


def check_shared_memory(machine: Machine) -> Check:
    """Size and free space of /dev/shm."""
    try:
        stats = os.statvfs(machine.root / "dev/shm")
    except OSError as error:
        return Check("shared memory", "note", f"/dev/shm: {error.strerror}", "mount a tmpfs there")  # noqa: S108 (told, not used)
    size, free = stats.f_blocks * stats.f_frsize, stats.f_bavail * stats.f_frsize
    found = f"/dev/shm: {_size(free)} free of {_size(size)}"  # noqa: S108 (told, not used)
    if free < SHARED_MEMORY_MIN_BYTES:
        return Check("shared memory", "note", found, "give it more (docker: --shm-size=8g) to place members there")
    return Check("shared memory", "ok", found)


def check_loopback(machine: Machine) -> Check:
    """Whether 127.0.0.1 accepts connections."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
    except OSError as error:
        return Check("loopback", "problem", f"127.0.0.1 does not work: {error}", "ip link set lo up", unusable=True)
    return Check("loopback", "ok", "127.0.0.1 accepts connections")


CHECKS: tuple[Callable[[Machine], Check], ...] = (
    check_python,
    check_packages,
    check_cpus,
    check_memory,
    check_cuda,
    check_io_uring,
    check_memory_lock,
    check_huge_pages,
    check_numa,
    check_nvme,
    check_nics,
    check_tcp_buffers,
    check_rdma,
    check_one_sided_reads,
    check_gpu_direct,
    check_open_files,
    check_shared_memory,
    check_loopback,
)


def examine(machine: Machine) -> list[Check]:
    """All checks, in the order they are shown."""
    return [check(machine) for check in CHECKS]
