"""What a host with an RDMA device lacks for one-sided reads of pool nodes (`penstock pool --rdma`), into its memory or
that of its GPUs (`penstock serve --gpu-direct`)."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator

from penstock.doctor.check import Check
from penstock.doctor.machine import Machine
from penstock.extras import missing_modules

MTU_MIN = 4200  # of the interface, for RoCE packets of 4096 bytes and their headers
CAP_IPC_LOCK = 14
_PROVIDER_FOLDERS = (
    "usr/lib/x86_64-linux-gnu/libibverbs",
    "usr/lib/aarch64-linux-gnu/libibverbs",
    "usr/lib64/libibverbs",
)
_PROVIDERS = {"mlx5_core": "mlx5", "mlx4_core": "mlx4", "bnxt_en": "bnxt_re", "ice": "irdma", "i40e": "irdma"}
_NO_GID = re.compile(r"[0:]*|fe80(:0000){7}")


def check_one_sided_reads(machine: Machine) -> Check:
    """NIXL or ibverbs, the limit of locked memory, huge pages; of each device its provider library, GIDs, and MTU."""
    name = "one-sided reads"
    devices = machine.names("sys/class/infiniband")
    if not devices:
        return Check(name, "ok", "no RDMA device: pool nodes are read in messages")
    lacks = [*_of_host(machine)]
    for device in devices:
        lacks += [(f"{device}: {what}", advice) for what, advice in _of_device(machine, device)]
    if not lacks:
        hint = "on RoCE, PFC or ECN on the switch keeps packets from being lost: see penstock fabric"
        return Check(name, "ok", f"ready on {', '.join(devices)}", hint)
    return Check(name, "note", "; ".join(what for what, _ in lacks), "; ".join(dict.fromkeys(how for _, how in lacks)))


def check_gpu_direct(machine: Machine) -> Check:
    """What cards need to write into the memory of NVIDIA's GPUs: a module of the kernel, or dma-buf."""
    name = "gpudirect rdma"
    cards, gpus = machine.names("sys/class/infiniband"), machine.names("proc/driver/nvidia/gpus")
    if not cards or not gpus:
        return Check(name, "ok", "no RDMA device beside a GPU of NVIDIA's: blocks go through the host's memory")
    hint = "serve --gpu-direct; nvidia-smi topo -m shows which card is beside which GPU (PIX, PXB)"
    if machine.names("sys/module", "nvidia_peermem"):
        return Check(name, "ok", "nvidia-peermem is loaded", hint)
    if "Open Kernel Module" in (machine.text("proc/driver/nvidia/version") or ""):
        return Check(name, "ok", "NVIDIA's open kernel modules, for dma-buf by NIXL; verbs need nvidia-peermem", hint)
    found = "neither nvidia-peermem nor NVIDIA's open kernel modules (dma-buf): cards cannot write into GPU memory"
    return Check(name, "note", found, "for serve --gpu-direct: modprobe nvidia-peermem")


def _of_host(machine: Machine) -> Iterator[tuple[str, str]]:
    if missing_modules("nixl") and missing_modules("verbs"):
        yield "neither NIXL nor ibverbs is installed", "pip install 'penstock[nixl]' or 'penstock[verbs]'"
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    capabilities = re.search(r"CapEff:\s*([0-9a-f]+)", machine.text("proc/self/status") or "")
    may_lock = capabilities is not None and int(capabilities[1], 16) >> CAP_IPC_LOCK & 1
    if soft != resource.RLIM_INFINITY and not may_lock:
        found = f"{soft >> 20} MiB may be locked, and all memory of a pool node is"
        yield found, "ulimit -l unlimited (systemd: LimitMEMLOCK=infinity)"
    if "[never]" in (machine.text("sys/kernel/mm/transparent_hugepage/enabled") or "[never]"):
        yield "no transparent huge pages", "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"


def _of_device(machine: Machine, device: str) -> Iterator[tuple[str, str]]:
    base = f"sys/class/infiniband/{device}"
    provider = _provider(machine, base, device)
    libraries = (machine.names(folder, rf"lib{provider}-rdmav\d+\.so") for folder in _PROVIDER_FOLDERS)
    if not any(libraries):
        yield f"no library of its provider ({provider})", "install ibverbs-providers (Debian) or rdma-core (Fedora)"
    for port in machine.names(f"{base}/ports"):
        gids = {
            one: machine.text(f"{base}/ports/{port}/gids/{one}") for one in machine.names(f"{base}/ports/{port}/gids")
        }
        used = [one for one, gid in gids.items() if gid and not _NO_GID.fullmatch(gid)]
        if not used:
            yield f"port {port} has no GID", "give its network interface an IP address"
        if (machine.text(f"{base}/ports/{port}/link_layer") or "") != "Ethernet":
            continue
        types = {machine.text(f"{base}/ports/{port}/gid_attrs/types/{one}") for one in used}
        if used and "RoCE v2" not in types:
            yield f"port {port} has no GID of RoCE v2", "give its network interface an IP address"
        for interface in {machine.text(f"{base}/ports/{port}/gid_attrs/ndevs/{one}") for one in used} - {None}:
            mtu = machine.number(f"sys/class/net/{interface}/mtu")
            if mtu is not None and mtu < MTU_MIN:
                yield f"MTU of {interface} is {mtu}", f"ip link set {interface} mtu 9000, on switches too"


def _provider(machine: Machine, base: str, device: str) -> str:
    """Name of the library that drives a device from user space."""
    driver = machine.link_name(f"{base}/device/driver")
    if driver is None:  # a device in software: rxe or siw
        return "siw" if device.startswith("siw") else "rxe"
    return _PROVIDERS.get(driver, driver)
