"""`penstock doctor` on this machine, on machines laid out as files, and under real restrictions."""

from __future__ import annotations

import errno
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from penstock.doctor import machine_checks as module
from penstock.doctor.check import Check
from penstock.doctor.command import doctor
from penstock.doctor.machine_checks import examine
from tests.doctor.laid_machine import Laid

app = typer.Typer()
app.command()(doctor)
RESTRICTED = Path(__file__).parents[1] / "io" / "restricted.py"


@pytest.fixture
def machine(tmp_path: Path) -> Laid:
    return Laid(tmp_path)


def test_runs_on_this_machine(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["--json", str(tmp_path / "out" / "doctor.json")], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "doctor.json").read_text())
    assert record["usable"] is True and len(record["checks"]) == len(module.CHECKS)
    for check in record["checks"]:
        assert check["name"] in result.output and check["found"]
        assert check["status"] == "ok" or check["advice"], "a finding that is not ok says what to do"


def test_an_unwritable_file_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(app, ["--json", str(tmp_path / "file" / "doctor.json")])
    assert result.exit_code == 2 and "cannot write" in result.output


def test_exit_code_1_when_penstock_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Check("broken", "problem", "a [bold] thing", "repair it", unusable=True)
    monkeypatch.setattr(module, "CHECKS", (lambda machine: broken,))
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 1
    assert "cannot run here" in result.output and "a [bold] thing" in result.output


def test_the_module_does_not_import_torch() -> None:
    code = "import sys, penstock.doctor.command; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_an_empty_machine_breaks_no_check(machine: Laid) -> None:
    assert all(check.found for check in examine(machine))


def test_refused_io_uring_is_a_problem_with_a_reason() -> None:
    code = "from penstock.doctor.machine_checks import *; print(check_io_uring(Machine()))"
    for number, words in ((errno.ENOSYS, "no io_uring"), (errno.EPERM, "forbidden")):
        command = [sys.executable, str(RESTRICTED), "no-uring", str(number), "--", code]
        said = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert "'problem'" in said.stdout and words in said.stdout, said.stderr


def test_disabled_io_uring_names_the_sysctl(machine: Laid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.io.ring.probe", lambda: "refused")
    machine.lay("proc/sys/kernel/io_uring_disabled", "2\n")
    check = module.check_io_uring(machine)
    assert check.status == "problem" and "forbids it to everybody" in check.found
    assert "sysctl -w kernel.io_uring_disabled=0" in check.advice


def test_a_low_memory_lock_limit_is_noted() -> None:
    code = "from penstock.doctor.machine_checks import *; print(check_memory_lock(Machine()))"
    command = [sys.executable, str(RESTRICTED), "memlock", "8192", "--", code]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    assert "'note'" in said and "8.0 MiB may be locked" in said and "LimitMEMLOCK" in said


def test_privilege_lifts_the_memory_lock_limit(machine: Laid) -> None:
    machine.lay("proc/self/status", "Name:\tx\nCapEff:\t0000000000004000\n")
    assert "CAP_IPC_LOCK" in module.check_memory_lock(machine).found


@pytest.mark.parametrize(("modes", "status"), [("always [madvise] never", "ok"), ("always madvise [never]", "note")])
def test_huge_pages(machine: Laid, modes: str, status: str) -> None:
    machine.lay("sys/kernel/mm/transparent_hugepage/enabled", modes)
    machine.lay("proc/meminfo", "HugePages_Total:      64\nHugepagesize:       2048 kB\n")
    check = module.check_huge_pages(machine)
    assert check.status == status and "reserved: 128.0 MiB" in check.found


def test_numa_nodes(machine: Laid) -> None:
    for node in (0, 1):
        machine.lay(f"sys/devices/system/node/node{node}/meminfo", f"Node {node} MemTotal:  {64 << 20} kB\n")
    assert "node0 64.0 GiB, node1 64.0 GiB" in module.check_numa(machine).found


def test_network_speeds(machine: Laid) -> None:
    for name, kind, state, speed in (
        ("lo", 772, "unknown", ""),
        ("eth0", 1, "up", "400000"),
        ("eth1", 1, "down", "100000"),
        ("veth0", 1, "up", "-1"),
    ):
        base = f"sys/class/net/{name}"
        machine.lay(f"{base}/type", str(kind))
        machine.lay(f"{base}/operstate", state)
        machine.lay(f"{base}/speed", speed)
    check = module.check_nics(machine)
    assert check.status == "ok" and check.found == "eth0 (400 Gbit/s), veth0 (speed unknown)"
    machine.lay("sys/class/net/eth0/speed", "1000")
    assert module.check_nics(machine).status == "note"


def test_small_tcp_buffers(machine: Laid) -> None:
    machine.lay("proc/sys/net/core/rmem_max", "212992")
    machine.lay("proc/sys/net/ipv4/tcp_rmem", "4096 131072 6291456")
    check = module.check_tcp_buffers(machine)
    assert check.status == "note" and "net.core.rmem_max=" in check.advice and "tcp_rmem" not in check.advice


def test_rdma_ports(machine: Laid) -> None:
    port = "sys/class/infiniband/mlx5_0/ports/1"
    machine.lay(f"{port}/state", "1: DOWN")
    machine.lay(f"{port}/rate", "400 Gb/sec (4X NDR)")
    assert "no port is active" in module.check_rdma(machine).advice
    machine.lay(f"{port}/state", "4: ACTIVE")
    assert "ib_uverbs" in module.check_rdma(machine).advice
    machine.lay("dev/infiniband/uverbs0")
    assert module.check_rdma(machine).status == "ok"


def test_nvme_drives(machine: Laid) -> None:
    machine.lay("sys/class/nvme/nvme0/model", "Fast Drive 9000   ")
    machine.lay("dev/ng0n1")
    assert module.check_nvme(machine).found == "nvme0 (Fast Drive 9000); passthrough devices: ng0n1"


def test_a_gpu_that_torch_cannot_use_is_a_problem(machine: Laid) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("torch can use the GPU here")
    assert module.check_cuda(machine).status == "ok"
    machine.lay("dev/nvidia0")
    check = module.check_cuda(machine)
    assert check.status == "problem" and "1 GPU(s)" in check.found and not check.unusable


def test_control_group_limits(machine: Laid) -> None:
    machine.lay("sys/fs/cgroup/cpu.max", "50000 100000")
    machine.lay("sys/fs/cgroup/memory.max", str(1 << 30))
    machine.lay("proc/meminfo", "MemTotal: 33554432 kB\nMemAvailable: 33554432 kB\n")
    assert "may use 0.5" in module.check_cpus(machine).found
    assert module.check_memory(machine).status == "note"


def test_few_open_files(machine: Laid) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        assert module.check_open_files(machine).status == "note"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
