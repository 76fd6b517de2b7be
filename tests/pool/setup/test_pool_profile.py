"""`penstock profile` and its file: measured in free space, refused while in use, read for weights and links."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from penstock.core.config import ConfigError
from penstock.pool.api import PoolError
from penstock.pool.members.memory import MemoryMember
from penstock.pool.net.node import PoolNode
from penstock.pool.setup.config import PoolConfig
from penstock.pool.setup.config_file import read_pool_config
from penstock.pool.setup.open import link_bytes_per_s, open_members_pool
from penstock.pool.setup.profile import MemberProfile, PoolProfile, Step, measure_pool, read_profile, write_profile
from tests.pool.helpers import chain, read, write

MIB = 1 << 20
TEXT = """
block_bytes = "64KiB"
profile = "profile.json"
[[member]]
kind = "memory"
capacity = "2MiB"
pace = "100MB/s"
[[member]]
kind = "uring"
path = "kv.slab"
capacity = "4MiB"
pace = "50MB/s"
"""


def described(folder: Path, text: str = TEXT) -> PoolConfig:
    (folder / "pool.toml").write_text(text)
    return read_pool_config(folder / "pool.toml")


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    given = ["profile", "--config", f"{folder}/pool.toml", "--seconds", "3", *arguments]
    return subprocess.run([sys.executable, "-m", "penstock", *given], capture_output=True, text=True, timeout=60.0)


def profile_of(rates: dict[str, float], links: dict[str, float] | None = None) -> PoolProfile:
    members = tuple(MemberProfile(name, "memory", None, rate, None, rate, None) for name, rate in rates.items())
    return PoolProfile(65536, members, links or {})


@pytest.mark.slow
def test_measures_writes_the_file_and_leaves_blocks_alone(tmp_path: Path) -> None:
    weighed = described(tmp_path, TEXT.replace('profile = "profile.json"', ""))
    pool = open_members_pool(weighed)
    keys = chain("kept", 200)
    assert {write(pool, key, parent) for key, parent in keys} == {"ok"}
    kept = [key for key, _ in keys if (found := pool.lookup([key], 1.0)[0]) and found.route == ("ssd:0",)]
    assert len(kept) > 30
    pool.close(5.0)
    described(tmp_path)
    done = command(tmp_path)
    assert done.returncode == 0 and "ssd:0" in done.stdout and f"written to {tmp_path}/profile.json" in done.stdout, (
        done
    )
    profile = read_profile(tmp_path / "profile.json")
    assert profile.block_bytes == 65536 and [m.name for m in profile.members] == ["memory:0", "ssd:0"]
    memory, slab = profile.members
    assert 0 < slab.read_bytes_per_s < 75e6 and 0 < memory.read_bytes_per_s < 150e6 and slab.write_bytes_per_s
    pool = open_members_pool(described(tmp_path))
    assert {read(pool, key) for key in kept} == {"ok"}
    shares = {member.name: member.weight for member in pool.stat(1.0).members}
    total = sum(profile.weights().values())
    assert shares == {name: pytest.approx(rate / total) for name, rate in profile.weights().items()}
    pool.close(5.0)


def test_a_pool_that_is_served_is_refused_in_one_line(tmp_path: Path) -> None:
    pool = open_members_pool(described(tmp_path, TEXT.replace('profile = "profile.json"', "")))
    done = command(tmp_path, "--out", str(tmp_path / "never.json"))
    pool.close(5.0)
    assert done.returncode == 2 and "already locked" in done.stderr and not (tmp_path / "never.json").exists()
    assert len(done.stderr.splitlines()) == 1 and not done.stdout


def test_the_link_to_a_node_is_measured_too(tmp_path: Path) -> None:
    pool = open_members_pool(described(tmp_path, '[[member]]\nkind = "memory"\ncapacity = "1MiB"'))
    node = PoolNode(pool, "127.0.0.1", 0)
    try:
        place = f"127.0.0.1:{node.address[1]}"
        described(tmp_path, f'[[member]]\nkind = "node"\naddress = "{place}"\n')
        done = command(tmp_path, "--out", str(tmp_path / "found.json"))
        assert done.returncode == 0, done
        assert read_profile(tmp_path / "found.json").links[f"net@{place}"] > 1e6
    finally:
        node.close(5.0)
        pool.close(5.0)


def test_weights_come_from_the_file_where_none_is_given(tmp_path: Path) -> None:
    write_profile(profile_of({"memory:0": 3e9, "ssd:0": 1e9}, {"net@h:1": 2e9}), tmp_path / "profile.json")
    config = described(tmp_path)
    pool = open_members_pool(config)
    assert [member.weight for member in pool.stat(1.0).members] == [0.75, 0.25]
    pool.close(5.0)
    assert link_bytes_per_s(config) == {"memory:0": 3e9, "ssd:0": 1e9, "net@h:1": 2e9}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", "is not one that penstock profile wrote: Object missing required field"),
        ("no", "is not one that penstock profile wrote"),
        (msgspec.json.encode(profile_of({"a": 0.0})).decode(), "a bandwidth that is not above 0"),
        (msgspec.json.encode(profile_of({"a": 1.0})).decode().replace('"version":1', '"version":9'), "has version 9"),
        (None, "cannot be read"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, text: str | None, expected: str) -> None:
    if text is not None:
        (tmp_path / "profile.json").write_text(text)
    with pytest.raises(ConfigError, match=expected):
        open_members_pool(described(tmp_path))


class Broken(MemoryMember):
    """Fails or has no free space, once measured together."""

    def __init__(self, reason: str) -> None:
        super().__init__("broken", MIB)
        self.reason, self.calls = reason, 0

    def measure(self, direction: str, block_bytes: int, budget_s: float) -> float:
        self.calls += 1
        if self.reason == "full" and direction == "write":
            raise PoolError("full", "no free space")
        if self.reason == "device" and self.calls > 2:
            raise PoolError("device", "read on broken: EIO")
        return 1e9


def test_a_full_member_is_measured_by_reading_and_a_failing_one_ends_it() -> None:
    steps: list[Step] = []
    plain = MemoryMember("plain", MIB)
    found = measure_pool([(plain, None), (Broken("full"), "x")], {}, 65536, steps.append, 0.2)
    assert found.members[1].write_bytes_per_s is None and found.members[1].read_bytes_per_s == 1e9
    assert [step.number for step in steps] == [1, 2, 3, 4, 5, 6] and steps[-1].text == "all together, read"
    with pytest.raises(PoolError, match="EIO"):
        measure_pool([(plain, None), (Broken("device"), "x")], {}, 65536, total_s=0.2)
