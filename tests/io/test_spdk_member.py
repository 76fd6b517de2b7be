"""Members of kind spdk in a pool from pool.toml, on the stand-in SPDK: they keep their blocks, and are checked."""

from __future__ import annotations

import queue
from pathlib import Path

import pytest

from penstock.core.new_block import NewBlock
from penstock.io import aligned_buffer
from penstock.pool.api import PoolError
from penstock.pool.setup.config_file import read_pool_config
from penstock.pool.setup.open import open_drive, open_members_pool
from tests.io import spdk_rig

ROOT = b"r" * 16
SIZE = 8192


def test_spdk_members_of_a_pool_keep_their_blocks(tmp_path: Path) -> None:
    standin = spdk_rig.standin()
    drives = [standin.drive("PCIE"), standin.drive("TCP")]
    drives[0].open().close(10.0)  # the environment of this process
    (tmp_path / "tables").mkdir()
    text = "state = 'tables'\nblock_bytes = '64KiB'\n"
    for name, drive in zip(("pcie", "target"), drives, strict=True):
        text += f"[[member]]\nkind = 'spdk'\n{name} = '{drive.target}'\nlibrary = '{standin.shim}'\nweight = 1\n"
    file = tmp_path / "pool.toml"
    file.write_text(text)
    config = read_pool_config(file)
    keys = [bytes([number]) * 16 for number in range(1, 31)]
    ends: queue.SimpleQueue[PoolError | None] = queue.SimpleQueue()
    with pytest.MonkeyPatch.context() as patched:
        # It runs with all of the rig's.
        patched.setattr("penstock.pool.setup.open._spdk_environment", lambda config: None)
        pool = open_members_pool(config)
        assert [m.capacity_bytes for m in pool.members] == [8 << 20] * 2
        with pytest.raises(BlockingIOError, match="is open in this process already"):
            open_drive(config, config.members[0])
        for key in keys:
            data = aligned_buffer(SIZE)
            data[:] = key * (SIZE // 16)
            pool.write(NewBlock(key, ROOT, SIZE, key[0]), data, 10.0, ends.put)
        assert [ends.get(timeout=20.0) for _ in keys] == [None] * len(keys)
        pool.close(10.0)
        pool = open_members_pool(config)
        assert all(member.blocks > 10 for member in pool.stat(1.0).members)
        for key in keys:
            into = aligned_buffer(SIZE)
            pool.read(key, SIZE, into, 10.0, ends.put)
            assert ends.get(timeout=20.0) is None and bytes(into) == key * (SIZE // 16)
        pool.close(10.0)
    assert standin.offence() == ""


def test_drives_and_vfio_user_get_one_environment_that_serves_both(tmp_path: Path) -> None:
    from penstock.pool.setup import open as opening

    file = tmp_path / "pool.toml"
    member = "[[member]]\nkind = 'spdk'\n{}\n"
    drive = member.format("pcie = '0000:01:00.0'")
    vfio = member.format("target = 'trtype:VFIOUSER traddr:/run/v'")
    tcp = member.format("target = 'trtype:TCP adrfam:IPv4 traddr:127.0.0.1 trsvcid:4420 subnqn:nqn.a'")
    found = []
    for members in (drive, tcp, drive + vfio, vfio + tcp):
        file.write_text("state = 'x'\n" + members)
        made = opening._spdk_environment(read_pool_config(file))  # noqa: SLF001 (there is no SPDK device to open)
        found.append(made and (made.pci_allowed, made.no_pci, made.hugepage_single_segments))
    assert found == [None, None, (("0000:01:00.0",), False, True), ((), True, True)]
