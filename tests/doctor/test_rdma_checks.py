"""What the doctor says of a host's RDMA devices, on machines laid out as files."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from penstock.doctor import rdma_checks
from penstock.doctor.rdma_checks import check_gpu_direct, check_one_sided_reads
from tests.doctor.laid_machine import Laid

DEVICE = "sys/class/infiniband/mlx5_0"
PORT = f"{DEVICE}/ports/1"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Laid:
    """A host with a card on which nothing is missing."""
    monkeypatch.setattr(rdma_checks, "missing_modules", lambda extra: [])
    made = Laid(tmp_path)
    made.lay("proc/self/status", "CapEff:\t0000000000004000\n")
    made.lay("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never")
    made.lay(f"{PORT}/link_layer", "Ethernet")
    made.lay(f"{PORT}/gids/0", "fe80:0000:0000:0000:0a00:00ff:fe00:0001")
    made.lay(f"{PORT}/gids/1", "0000:0000:0000:0000:0000:ffff:0a01:0005")
    made.lay(f"{PORT}/gids/2", "0000:0000:0000:0000:0000:0000:0000:0000")
    made.lay(f"{PORT}/gid_attrs/types/1", "RoCE v2")
    made.lay(f"{PORT}/gid_attrs/ndevs/1", "eth5")
    made.lay("sys/class/net/eth5/mtu", "9000")
    (tmp_path / DEVICE / "device").mkdir(parents=True)
    os.symlink("../../../bus/pci/drivers/mlx5_core", tmp_path / DEVICE / "device" / "driver")
    made.lay("usr/lib/x86_64-linux-gnu/libibverbs/libmlx5-rdmav34.so")
    return made


def test_a_host_without_a_device_lacks_nothing(tmp_path: Path) -> None:
    assert check_one_sided_reads(Laid(tmp_path)).status == "ok"


def test_a_complete_host_is_ok_and_hears_of_pfc(machine: Laid) -> None:
    check = check_one_sided_reads(machine)
    assert (check.status, check.found) == ("ok", "ready on mlx5_0") and "PFC" in check.advice


@pytest.mark.parametrize(
    ("path", "text", "found", "advice"),
    [
        ("sys/class/net/eth5/mtu", "1500", "mlx5_0: MTU of eth5 is 1500", "mtu 9000"),
        (f"{PORT}/gid_attrs/types/1", "IB/RoCE v1", "no GID of RoCE v2", "IP address"),
        ("sys/kernel/mm/transparent_hugepage/enabled", "always [never]", "no transparent huge pages", "madvise"),
    ],
)
def test_what_is_misconfigured_is_named(machine: Laid, path: str, text: str, found: str, advice: str) -> None:
    machine.lay(path, text)
    check = check_one_sided_reads(machine)
    assert check.status == "note" and found in check.found and advice in check.advice


def test_what_is_missing_is_named(machine: Laid, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine.root / "usr/lib/x86_64-linux-gnu/libibverbs/libmlx5-rdmav34.so").unlink()
    (machine.root / PORT / "gids" / "1").unlink()
    (machine.root / PORT / "gids" / "0").unlink()
    monkeypatch.setattr(rdma_checks, "missing_modules", lambda extra: ["a module"])
    machine.lay("proc/self/status", "CapEff:\t0000000000000000\n")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (8 << 20, 8 << 20))
    check = check_one_sided_reads(machine)
    for what in (
        "neither NIXL nor ibverbs is installed",
        "8 MiB may be locked",
        "provider (mlx5)",
        "port 1 has no GID",
    ):
        assert what in check.found
    for how in ("penstock[nixl]", "penstock[verbs]", "LimitMEMLOCK", "ibverbs-providers"):
        assert how in check.advice


@pytest.mark.parametrize("installed", ["nixl", "verbs"])
def test_one_transport_is_enough(machine: Laid, monkeypatch: pytest.MonkeyPatch, installed: str) -> None:
    monkeypatch.setattr(rdma_checks, "missing_modules", lambda extra: [] if extra == installed else ["a module"])
    assert check_one_sided_reads(machine).status == "ok"


def test_devices_in_software_have_providers_of_their_own(machine: Laid) -> None:
    machine.lay("sys/class/infiniband/rxe0/ports/1/link_layer", "Ethernet")
    assert "rxe0: no library of its provider (rxe)" in check_one_sided_reads(machine).found


def test_cards_and_gpus_need_a_module_between_them(machine: Laid) -> None:
    check = check_gpu_direct(machine)
    assert check.status == "ok" and "no RDMA device beside a GPU" in check.found
    machine.lay("proc/driver/nvidia/gpus/0000:3b:00.0/information", "Model: H200")
    version = "proc/driver/nvidia/version"
    machine.lay(version, "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06")
    check = check_gpu_direct(machine)
    assert (check.status, check.advice) == ("note", "for serve --gpu-direct: modprobe nvidia-peermem")
    machine.lay(version, "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06")
    check = check_gpu_direct(machine)
    assert check.status == "ok" and "dma-buf" in check.found
    machine.lay("sys/module/nvidia_peermem/refcnt", "0")
    assert check_gpu_direct(machine).found == "nvidia-peermem is loaded"
