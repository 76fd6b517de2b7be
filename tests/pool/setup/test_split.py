"""The configurations of the processes of one node: what is divided, what each has in full, and where a drive stays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from penstock.core.config import ConfigError
from penstock.pool.setup.config import MemberConfig, PoolConfig, Quota, config_of_flags
from penstock.pool.setup.config_file import read_pool_config
from penstock.pool.setup.split import Splitter, drive_node, process_count

MIB = 1 << 20


def host(folder: Path, *cpus: str) -> Path:
    """The files under /sys of a host with these processors by NUMA node; two drives hang on the last one."""
    for number, some in enumerate(cpus):
        node = folder / f"devices/system/node/node{number}"
        node.mkdir(parents=True)
        (node / "cpulist").write_text(some + "\n")
    for name in ("ng0n1", "ng1n1"):
        drive = folder / "class/nvme-generic" / name / "device"
        drive.mkdir(parents=True)
        (drive / "numa_node").write_text(f"{len(cpus) - 1}\n")
    return folder


def drives(count: int) -> tuple[MemberConfig, ...]:
    return tuple(MemberConfig("nvme", f"ssd:{at}", 8 * MIB, path=Path(f"/dev/ng{at}n1")) for at in range(count))


def memory(size_bytes: int = 64 * MIB, node: int | None = None, name: str = "memory:0") -> MemberConfig:
    return MemberConfig("memory", name, size_bytes, weight=3.0, numa_node=node, pace_bytes_per_s=1e9)


def test_what_the_processes_have_together_is_what_the_file_says(tmp_path: Path) -> None:
    config = PoolConfig(
        (memory(), *drives(2)), processes=2, listen="127.0.0.1:7070", metrics_listen="127.0.0.1:9100",
        pace_bytes_per_s=8e9, staging_bytes=256 * MIB, connections=600, default_quota=Quota(share=0.25),
        quotas=(("a", Quota(limit_bytes=40 * MIB)), ("b", Quota(share=0.1))),
    )  # fmt: skip
    one, two = Splitter(2, [7070, 7071], host(tmp_path, "0-3")).split(config)
    for number, part in enumerate((one, two)):
        found = part.config
        assert [member.name for member in found.members] == ["memory:0", f"ssd:{number}"]
        half = found.members[0]
        assert (half.capacity_bytes, half.weight, half.part, half.pace_bytes_per_s) == (32 * MIB, 1.5, 0.5, 5e8)
        assert (found.pace_bytes_per_s, found.staging_bytes, found.connections) == (4e9, 128 * MIB, 600)
        assert found.default_quota == Quota(share=0.25)
        assert dict(found.quotas) == {"a": Quota(limit_bytes=20 * MIB), "b": Quota(share=0.1)}
        assert (found.listen, found.metrics_listen) == (f"127.0.0.1:{7070 + number}", f"127.0.0.1:{9100 + number}")
        assert found.name == f"pool-{number}" and part.siblings == (7071 - number,) and not part.cpus


def test_processes_stay_on_numa_nodes_with_their_memory_and_drives(tmp_path: Path) -> None:
    system = host(tmp_path, "0-3,8", "4-7")
    config = PoolConfig((memory(), memory(16 * MIB, 1, "near"), *drives(2)), processes="numa")
    assert process_count(config, system) == 2 and drive_node(drives(1)[0], system) == 1
    one, two = Splitter(2, [1, 2], system).split(config)
    assert sorted(one.cpus) == [0, 1, 2, 3, 8] and sorted(two.cpus) == [4, 5, 6, 7]
    assert [(m.name, m.numa_node, m.capacity_bytes) for m in one.config.members] == [("memory:0", 0, 32 * MIB)]
    assert [(m.name, m.numa_node) for m in two.config.members] == [
        ("memory:0", 1), ("near", 1), ("ssd:0", None), ("ssd:1", None),
    ]  # fmt: skip
    four = Splitter(4, range(4), system).split(replace(config, processes=4))
    assert [sorted(part.cpus) for part in four] == [[0, 1, 2, 3, 8]] * 2 + [[4, 5, 6, 7]] * 2
    assert [len(part.config.members) for part in four] == [1, 1, 3, 3]
    (all_,) = Splitter(1, [1], system).split(replace(config, processes=1))
    assert sorted(all_.cpus) == list(range(9)) and all_.config.members[0].numa_node is None


def test_a_drive_stays_with_its_process_whatever_comes_and_goes(tmp_path: Path) -> None:
    splitter = Splitter(2, [1, 2], host(tmp_path, "0"))
    all_ = drives(4)

    def placed(*numbers: int) -> list[list[str]]:
        parts = splitter.split(PoolConfig((memory(), *(all_[number] for number in numbers)), processes=2))
        return [[member.name for member in part.config.members[1:]] for part in parts]

    assert placed(0, 1) == [["ssd:0"], ["ssd:1"]]
    assert placed(1) == [[], ["ssd:1"]]
    assert placed(2, 1, 3) == [["ssd:2", "ssd:3"], ["ssd:1"]] or placed(2, 1, 3) == [["ssd:2"], ["ssd:1", "ssd:3"]]
    before = placed(1, 2, 3)
    assert placed(3, 2, 1, 0)[0][-1] == "ssd:0", "it comes back where its blocks may still be drained from"
    assert [sorted(set(some) - {"ssd:0"}) for some in placed(3, 2, 1, 0)] == [sorted(some) for some in before]


def test_as_many_processes_as_there_are_drives_or_numa_nodes(tmp_path: Path) -> None:
    system = host(tmp_path, "0", "1", "")
    config = PoolConfig((memory(), *drives(3)))
    assert process_count(config, system) == 1
    assert process_count(replace(config, processes="drives"), system) == 3
    assert process_count(replace(config, processes="numa"), system) == 2, "one has no processors"
    assert process_count(PoolConfig((memory(),), processes="drives"), system) == 1


def test_what_cannot_be_divided_is_refused_with_what_is_allowed(tmp_path: Path) -> None:
    system = host(tmp_path, "0")
    splitter = Splitter(2, [1, 2], system)
    for config, why in (
        (PoolConfig(drives(1), processes=2), "process 1 has no member"),
        (PoolConfig((memory(4096),), processes=2), "4096 bytes for 2 processes"),
        (PoolConfig((memory(node=3),), processes=2), "numa_node is 3; allowed: 0"),
        (PoolConfig((memory(),), processes=2, metrics_listen="127.0.0.1:65535"), "metrics_listen"),
    ):
        with pytest.raises(ConfigError, match=why):
            splitter.split(config)
    other = MemberConfig("node", "node:0", address="127.0.0.1:1")
    with pytest.raises(ConfigError, match="node:0 is another pool node"):
        process_count(PoolConfig((memory(), other), processes=2), system)
    assert process_count(PoolConfig((memory(), other)), system) == 1


def test_the_setting_is_a_number_or_a_word_in_the_file_and_by_flag(tmp_path: Path) -> None:
    file = tmp_path / "pool.toml"
    for written, value in (("2", 2), ('"numa"', "numa"), ('"drives"', "drives"), ('"3"', 3)):
        file.write_text(f'processes = {written}\n[[member]]\nkind = "memory"\ncapacity = "1MiB"\n')
        assert read_pool_config(file).processes == value
    for written in ("0", "65", '"many"', "1.5"):
        file.write_text(f'processes = {written}\n[[member]]\nkind = "memory"\ncapacity = "1MiB"\n')
        with pytest.raises(ConfigError, match="processes"):
            read_pool_config(file)
    assert config_of_flags([MIB], [], processes=2).processes == 2
