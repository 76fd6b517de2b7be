"""A pool from its configuration: nodes in it, weights on one scale, an engine that embeds it; nothing left open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from penstock.core.config import ConfigError, SchedulerConfig
from penstock.core.cost import CostModel
from penstock.engine import build
from penstock.engine.config import EngineConfig
from penstock.engine.engine import Engine
from penstock.pool.net.connect import connect_pool
from penstock.pool.net.node import PoolNode
from penstock.pool.setup.config_file import read_pool_config
from penstock.pool.setup.open import open_local_pool, open_pool
from penstock.pool.setup.profile import MemberProfile, PoolProfile, write_profile
from tests.pool.helpers import chain, read, write

MIB = 1 << 20
MEMORY = '[[member]]\nkind = "memory"\ncapacity = "1MiB"\n'
SLAB = '[[member]]\nkind = "uring"\npath = "kv.slab"\ncapacity = "1MiB"\n'


def file_of(folder: Path, text: str) -> Path:
    (folder / "pool.toml").write_text(text)
    return folder / "pool.toml"


def test_a_node_serves_its_own_members_and_those_of_another_node(tmp_path: Path) -> None:
    remote = open_local_pool([2 * MIB], [])
    behind = PoolNode(remote, "127.0.0.1", 0)
    address = f"127.0.0.1:{behind.address[1]}"
    text = MEMORY + f'weight = 1e9\n[[member]]\nkind = "node"\naddress = "{address}"\nweight = 1e9\n'
    front_pool = open_pool(read_pool_config(file_of(tmp_path, text)), serves=True)
    front = PoolNode(front_pool, "127.0.0.1", 0)
    client = connect_pool(f"127.0.0.1:{front.address[1]}")
    try:
        keys = chain("both", 60)
        assert [write(client, key, parent) for key, parent in keys] == ["ok"] * 60
        assert remote.stat(1.0).members[0].blocks > 15
        client.lookup([key for key, _ in keys], 5.0)
        assert [read(client, key) for key, _ in keys] == ["ok"] * 60
    finally:
        client.close(5.0)
        front.close(5.0)
        front_pool.close(5.0)
        behind.close(5.0)
        remote.close(5.0)


def test_an_engine_embeds_a_pool_from_its_file_with_the_profile_of_its_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs: list[CostModel] = []

    def watched(scheduler: SchedulerConfig, cost: CostModel, *others: Any) -> Engine:
        costs.append(cost)
        return Engine(scheduler, cost, *others)

    monkeypatch.setattr(build, "Engine", watched)
    members = (MemberProfile("memory:0", "memory", None, 3e9, None, 3e9, None),)
    write_profile(PoolProfile(65536, members), tmp_path / "profile.json")
    file = file_of(tmp_path, 'profile = "profile.json"\n' + MEMORY + 'name = "memory:0"\n')
    sizes: dict[str, Any] = {"kv_memory_bytes": MIB, "staging_bytes": MIB}
    config = EngineConfig(executor="modelled", bytes_divisor=1024, pool_config=str(file), **sizes)
    built = build.build_engine(config)
    try:
        assert built.pool is not None and [m.name for m in built.pool.stat(1.0).members] == ["memory:0"]
        assert costs[0].link("memory:0").bytes_per_s == 3e9
    finally:
        built.close()
    with pytest.raises(ConfigError, match="pool_config is set together with"):
        EngineConfig(executor="modelled", pool_config=str(file), memory=(MIB,))
    with pytest.raises(ConfigError, match="cannot be read"):
        build.build_engine(EngineConfig(executor="modelled", bytes_divisor=1024, pool_config="absent.toml", **sizes))


def test_an_engine_says_at_start_which_members_and_nodes_its_blocks_do_not_fit(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pool = open_local_pool([MIB], [])
    node = PoolNode(pool, "127.0.0.1", 0, staging_capacity_bytes=4096)
    place = f"127.0.0.1:{node.address[1]}"
    sizes: dict[str, Any] = {"kv_memory_bytes": MIB, "staging_bytes": MIB, "bytes_divisor": 1024}
    built = build.build_engine(EngineConfig(executor="modelled", memory=(4096,), pool=(place,), **sizes))
    alone = build.build_engine(EngineConfig(executor="modelled", pool=(place,), **sizes))
    try:
        said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert len([line for line in said if line.startswith("member memory:0 has room for 4 KiB, a block")]) == 1
        assert len([line for line in said if line.startswith(f"pool node {place} takes blocks of at most 4 KiB")]) == 2
    finally:
        built.close()
        alone.close()
        node.close(5.0)
        pool.close(5.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (MEMORY + "weight = 0", "every weight is 0"),
        (MEMORY + "weight = 3\n" + SLAB, "give all of them weights, or none"),
        (SLAB.replace("1MiB", "all"), 'is "all"; allowed for a block device only'),
        (SLAB + MEMORY + "numa_node = 1000", "numa_node is 1000; allowed: 0"),
        (MEMORY + SLAB.replace("kv.slab", "absent/kv.slab"), "does not exist"),
        (f"state = 'x'\n{MEMORY}[[member]]\nkind = 'nvme'\npath = '/dev/ng99n1'", "ng99n1"),
        (f"state = 'x'\n{MEMORY}[[member]]\nkind = 'spdk'\npcie = '0000:01:00.0'\nlibrary = 'none.so'", "none.so"),
        (MEMORY + "[[member]]\nkind = 'node'\naddress = '127.0.0.1:1'\nname = '-'", "name is '-'"),
    ],
)
def test_what_cannot_be_opened_is_one_line_and_leaves_nothing_open(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises((ValueError, OSError)) as found:
        open_pool(read_pool_config(file_of(tmp_path, text)))
    assert expected in str(found.value) and "\n" not in str(found.value)
    open_pool(read_pool_config(file_of(tmp_path, SLAB))).close(5.0)  # its lock is free
