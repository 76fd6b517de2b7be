"""pool.toml: what it means, the names that members get, and one line for everything that is wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from penstock.core.config import ConfigError
from penstock.core.new_block import tenant_tag
from penstock.pool.setup.config import KINDS, PoolConfig, config_of_flags
from penstock.pool.setup.config_file import read_pool_config
from penstock.pool.setup.open import policy_of

MIB = 1 << 20
EXAMPLE = Path(__file__).parents[3] / "deploy" / "pool.toml"


def config(folder: Path, text: str) -> PoolConfig:
    file = folder / "pool.toml"
    file.write_text(text)
    return read_pool_config(file)


def refused(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as found:
        config(folder, text)
    line = str(found.value)
    assert line.startswith(f"{folder}/pool.toml: ") and "\n" not in line
    return line.partition("pool.toml: ")[2]


def test_every_kind_and_key_is_read(tmp_path: Path) -> None:
    read = config(
        tmp_path,
        """
        name = "rack7"
        listen = "127.0.0.1:0"
        state = "tables"
        write_admission = "reused"
        pace = "200MB/s"
        profile = "profile.json"
        block_bytes = "8MiB"
        connections = 2000
        connections_per_address = 1500
        [[member]]
        kind = "memory"
        capacity = "2MiB"
        numa_node = 0
        weight = 3
        [[member]]
        kind = "uring"
        path = "kv.slab"
        capacity = "1GiB"
        pace = "10Gbit/s"
        depth = 8
        [[member]]
        kind = "nvme"
        path = "/dev/ng0n1"
        [[member]]
        kind = "spdk"
        pcie = "0000:5e:00.0"
        namespace = 2
        cpu = 3
        library = "/opt/shim.so"
        name = "fast"
        [[member]]
        kind = "node"
        address = "10.0.0.7:7070"
        weight = "auto"
        [quota]
        default = "25%"
        tenants = { alice = "1MiB" }
        """,
    )
    assert [m.name for m in read.members] == ["memory:0", "ssd:0", "ssd:1", "fast", "node:0"]
    memory, uring, nvme, spdk, node = read.members
    assert memory.capacity_bytes == 2 * MIB and memory.numa_node == 0 and memory.weight == 3.0
    assert uring.path == tmp_path / "kv.slab" and uring.pace_bytes_per_s == 1.25e9 and uring.depth == 8
    assert nvme.capacity_bytes is None and nvme.weight is None
    assert spdk.where == "0000:5e:00.0 namespace 2" and spdk.cpu == 3 and spdk.library == Path("/opt/shim.so")
    assert node.address == node.where == "10.0.0.7:7070"
    assert read.state == tmp_path / "tables" and read.profile == tmp_path / "profile.json"
    assert (read.connections, read.connections_per_address) == (2000, 1500)
    assert read.block_bytes == 8 * MIB and read.pace_bytes_per_s == 200e6 and read.write_admission == "reused"
    assert read.quota_bytes(8 * MIB) == (2 * MIB, {tenant_tag("alice"): MIB})


def test_unknown_tenants_are_refused_where_the_file_says_so(tmp_path: Path) -> None:
    whole = "[quota]\nunknown = 'refuse'\ntenants = { bob = '1MiB' }\n"
    assert config(tmp_path, MEMORY + whole).named_tenants_only
    assert not config(tmp_path, MEMORY + whole.replace("refuse", "share")).named_tenants_only


def test_quotas_by_name_beyond_the_pool_are_said_at_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    policy_of(config(tmp_path, MEMORY + "[quota]\ntenants = { a = '75%', b = '50%' }"), 4 * MIB)
    assert "the quotas of [quota] tenants are 5 MiB together, the pool has 4 MiB" in caplog.text
    caplog.clear()
    policy_of(config(tmp_path, MEMORY + "[quota]\ntenants = { a = '50%', b = '50%' }"), 4 * MIB)
    assert caplog.text == ""


def test_the_example_is_read_as_it_stands_and_with_all_that_is_commented_out(tmp_path: Path) -> None:
    read_pool_config(EXAMPLE)
    whole = re.sub(r"^# (?=\[|\w+ = )", "", EXAMPLE.read_text(), flags=re.MULTILINE)
    read = config(tmp_path, whole)
    assert {m.kind for m in read.members} == set(KINDS) and read.state and read.quotas and read.profile


def test_tables_of_slabs_with_one_file_name_do_not_meet(tmp_path: Path) -> None:
    made = config_of_flags([], [(Path("/a/kv.slab"), MIB), (Path("/b/kv.slab"), MIB)], state=tmp_path)
    assert [made.table_of(m) for m in made.members] == [tmp_path / "a-kv.slab.db", tmp_path / "b-kv.slab.db"]


def test_flags_make_the_same_record() -> None:
    made = config_of_flags([MIB, MIB], [(Path("/a"), MIB)], [1.0, 2.0, 3.0])
    assert [(m.kind, m.name, m.weight) for m in made.members] == [
        ("memory", "memory:0", 1.0),
        ("memory", "memory:1", 2.0),
        ("uring", "ssd:0", 3.0),
    ]
    with pytest.raises(ConfigError, match="3 members and 1 weights"):
        config_of_flags([MIB, MIB], [(Path("/a"), MIB)], [1.0])


def test_a_member_that_runs_keeps_its_name_when_others_leave(tmp_path: Path) -> None:
    slab = '[[member]]\nkind = "uring"\npath = "{}"\ncapacity = "1MiB"\n'
    before = config(tmp_path, slab.format("a") + slab.format("b"))
    (tmp_path / "pool.toml").write_text(slab.format("c") + slab.format("b"))
    after = read_pool_config(tmp_path / "pool.toml", before.members)
    assert [(m.name, m.path and m.path.name) for m in after.members] == [("ssd:2", "c"), ("ssd:1", "b")]


MEMORY = '[[member]]\nkind = "memory"\ncapacity = "1MiB"\n'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name = ", "not TOML"),
        ("", "member is missing; allowed: at least one table [[member]]"),
        ("member = []", "no member"),
        ("[member]\n", "member is {}; allowed: tables [[member]]"),
        ("colour = 1\n" + MEMORY, "has 'colour'; allowed: member, name, listen"),
        ("name = 1\n" + MEMORY, "name is 1; allowed: text"),
        ("listen = '7070'\n" + MEMORY, "allowed is HOST:PORT"),
        ("pace = 'fast'\n" + MEMORY, "rate 'fast'"),
        ("block_bytes = '1KiB'\n" + MEMORY, "block_bytes is 1024; allowed: 4KiB to 1GiB"),
        ("write_admission = 'some'\n" + MEMORY, "write_admission is 'some'; allowed: all, reused"),
        ("[[member]]\ncapacity = '1MiB'", "[[member]] 1: kind is missing; allowed: kind = memory, uring"),
        ("[[member]]\nkind = 'disk'", "[[member]] 1: kind is 'disk'; allowed: memory, uring, nvme, spdk, node"),
        ("[[member]]\nkind = 'memory'", "[[member]] 1: capacity is missing; allowed: capacity = a size"),
        ("[[member]]\nkind = 'memory'\ncapacity = 5", "[[member]] 1: capacity is 5; allowed: text"),
        ("[[member]]\nkind = 'memory'\ncapacity = 'all'", "[[member]] 1: capacity is 'all'; allowed: a size"),
        ("[[member]]\nkind = 'nvme'\npath = ''", "[[member]] 1: path is empty"),
        (
            MEMORY + "[[member]]\nkind = 'uring'\nname = 'x'\ncapacity = '1MiB'",
            "[[member]] 2 (x): path is missing; allowed: path = ",
        ),
        (MEMORY + "path = '/a'", "[[member]] 1: has 'path'; allowed: kind, name, weight, pace, capacity, numa_node"),
        (MEMORY + "name = '../a'", "[[member]] 1 (../a): name is '../a'; allowed: up to 64 letters"),
        (MEMORY + "weight = 'heavy'", "weight is 'heavy'; allowed: \"auto\" or a number from 0"),
        (MEMORY + "weight = -1", "weight is -1"),
        (MEMORY + "weight = true", "weight is True"),
        (MEMORY + "numa_node = -1", "numa_node is -1; allowed: 0 to 1023"),
        (MEMORY + "name = 'a'\n" + MEMORY + "name = 'a'", "two members have the name a; allowed: each only once"),
        ("[[member]]\nkind = 'uring'\npath = '/a'\ncapacity = '1MiB'\n" * 2, "two members have the device /a"),
        ("[[member]]\nkind = 'uring'\npath = '/a'\ncapacity = '1MiB'\ndepth = 0", "depth is 0; allowed: 1 to 256"),
        ("[[member]]\nkind = 'nvme'\npath = '/dev/ng0n1'", "state is missing; allowed: a folder for the table"),
        ("[[member]]\nkind = 'uring'\npath = '/dev/sdz'\ncapacity = '1MiB'", "state is missing"),
        ("[[member]]\nkind = 'spdk'", "allowed: either pcie or target"),
        ("[[member]]\nkind = 'spdk'\npcie = 'x'", "pcie is 'x'; allowed: an address such as 0000:01:00.0"),
        ("[[member]]\nkind = 'node'", "address is missing; allowed: address = HOST:PORT"),
        ("[[member]]\nkind = 'node'\naddress = 'x'", "address 'x' is not understood"),
        (MEMORY + "[quota]\nbob = '1MiB'", "[quota] has 'bob'; allowed: default, tenants"),
        (MEMORY + "[quota]\ndefault = '120%'", "[quota] default is '120%'; allowed: a size"),
        (MEMORY + "[quota]\ntenants = { bob = 7 }", "[quota] tenants.bob is 7"),
        (MEMORY + "[quota]\ntenants = 7", "[quota] tenants is not understood; allowed: a table of cache_salt"),
        (MEMORY + "[quota]\nunknown = 'deny'", "[quota] unknown is 'deny'; allowed: share, refuse"),
        (MEMORY + "[quota]\nunknown = 1", "[quota] unknown is 1; allowed: share, refuse"),
        (MEMORY + "[quota]\nunknown = ['refuse']", "[quota] unknown is ['refuse']; allowed: share, refuse"),
        (MEMORY + "[quota]\nunknown = 'refuse'", '[quota] unknown is "refuse" and tenants is empty'),
        (
            MEMORY + "[quota]\nunknown = 'refuse'\ndefault = '1%'\ntenants = { bob = '1MiB' }",
            '[quota] has a default for tenants that unknown = "refuse" refuses',
        ),
    ],
)
def test_what_is_wrong_is_one_line_with_its_place(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in refused(tmp_path, text)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_pool_config(tmp_path / "absent.toml")


def test_rdma_by_file(tmp_path: Path) -> None:
    read = config(tmp_path, 'rdma = true\nrdma_device = ["mlx5_0", "mlx5_1"]\n' + MEMORY)
    assert read.rdma and read.rdma_device == ("mlx5_0", "mlx5_1")
    assert config(tmp_path, 'rdma = true\nrdma_device = "mlx5_0"\n' + MEMORY).rdma_device == ("mlx5_0",)
    assert read.rdma_transport == "nixl"
    assert config(tmp_path, 'rdma = true\nrdma_transport = "verbs"\n' + MEMORY).rdma_transport == "verbs"
    assert not config(tmp_path, MEMORY).rdma
    assert "rdma_transport is given without rdma" in refused(tmp_path, 'rdma_transport = "verbs"\n' + MEMORY)
    assert "nixl, verbs" in refused(tmp_path, 'rdma = true\nrdma_transport = "tcp"\n' + MEMORY)
    assert "rdma_device is given without rdma" in refused(tmp_path, 'rdma_device = "mlx5_0"\n' + MEMORY)
    assert "rdma and pace are both given" in refused(tmp_path, 'rdma = true\npace = "1GB/s"\n' + MEMORY)


@pytest.mark.parametrize("key", ["connections", "connections_per_address"])
def test_impossible_numbers_of_connections_are_refused(tmp_path: Path, key: str) -> None:
    member = '[[member]]\nkind = "memory"\ncapacity = "1MiB"\n'
    assert refused(tmp_path, f"{key} = 0\n{member}") == f"{key} is 0; allowed: from 1 to 65536"
    assert refused(tmp_path, f'{key} = "many"\n{member}') == f"{key} is 'many'; allowed: a whole number"


@pytest.mark.parametrize("share", ["-0.1", "0.6", "nan"])
def test_a_share_for_copies_out_of_bounds_is_refused(tmp_path: Path, share: str) -> None:
    line = refused(tmp_path, f"replicate = {share}\n" + MEMORY)
    assert line == f"replicate is {share}; allowed: from 0 (no copies) to 0.5"


def test_a_share_for_copies_reaches_the_pool(tmp_path: Path) -> None:
    assert policy_of(config(tmp_path, "replicate = 0.25\n" + MEMORY), MIB).copies_share == 0.25
    assert policy_of(config(tmp_path, MEMORY), MIB).copies_share == 0.0
