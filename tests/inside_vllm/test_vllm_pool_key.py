"""vLLM with a pool key: forged blocks on a node cost time, never another output."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.core.config import ConfigError
from penstock.pool.checksum import block_checksum
from penstock.pool.members.slab_index import RowTable
from tests.inside_vllm.vllm_rig import BLOCK, PoolProcess, prompt_of, running

PROMPTS = [prompt_of(seed, BLOCK * 4 + 9) for seed in range(60, 63)]
LOADABLE = 3 * 4 * BLOCK
BLOCKS = LOADABLE // BLOCK


@pytest.fixture
def key_file(tmp_path: Path) -> Callable[[str], str]:
    def made(name: str) -> str:
        path = tmp_path / name
        path.touch(0o600)
        path.write_text(name * 32)
        return str(path)

    return made


def forge(slab: Path) -> int:
    """Other bytes with a right checksum in the place of every block, as who has the disk can; how many."""
    table = RowTable(slab.with_name(slab.name + ".db"))
    stored = table.rows()[0]
    with slab.open("r+b") as file:
        for block, _ in stored:
            junk = b"\0\0\x40\x40" * (block.size_bytes // 4)
            file.seek(block.offset)
            file.write(junk)
            block.checksum = block_checksum(block.key, memoryview(junk))
    table.change([], stored, [])
    table.close()
    return len(stored)


def test_forged_blocks_are_computed_and_written_anew(
    llama: Path,
    computed: Callable[..., list[list[int]]],
    pool_process: Callable[..., PoolProcess],
    key_file: Callable[[str], str],
    tmp_path: Path,
) -> None:
    path, expected = tmp_path / "kv.slab", computed("llama", PROMPTS)
    pool = pool_process("--slab", f"{path}:64MiB")
    extra = {"pool": pool.address, "pool_key_file": key_file("a")}
    with running(llama, extra) as engine:
        assert engine.ask(PROMPTS) == expected
        pool.wait_for_blocks(BLOCKS)
        assert engine.again(PROMPTS, LOADABLE) == expected
        assert not engine.connector.side.host.activity.load_failures
    pool.stop()
    assert forge(path) == BLOCKS
    pool.start()
    with running(llama, extra) as engine:
        assert engine.again(PROMPTS, 0) == expected, "forged KV was computed with"
        failures = engine.connector.side.host.activity.load_failures
        assert set(failures) == {"mac"}
        for _ in range(4 * BLOCKS):  # a forged block is replaced once it was refused
            refused, had = failures["mac"], engine.counts().external
            assert engine.again(PROMPTS, 0) == expected
            if engine.counts().external - had == LOADABLE and failures["mac"] == refused:
                break
        else:
            raise AssertionError("some block never came whole again")
        assert pool.checksum_errors() == 0 and pool.blocks() == BLOCKS
    with running(llama, {"pool": pool.address, "pool_key_file": key_file("b")}) as engine:
        assert engine.again(PROMPTS, 0) == expected and engine.counts().external == 0
        pool.wait_for_blocks(2 * BLOCKS)
        assert engine.again(PROMPTS, LOADABLE) == expected
        assert not engine.connector.side.host.activity.load_failures


def test_a_key_file_that_cannot_be_used_ends_the_start(llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("x" * 40)
    path.chmod(0o644)
    with (
        pytest.raises(ConfigError, match="mode 644"),
        running(llama, {"memory": "8MiB", "pool_key_file": str(path)}),
    ):
        pass
