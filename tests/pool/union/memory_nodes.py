"""Pool nodes without a network, for unions of hundreds: each a dictionary, up or down as a test says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from penstock.core.keys import BlockKey
from penstock.core.new_block import NewBlock
from penstock.pool.api import Done, DoneMany, Located, MemberStat, PoolError, PoolStat, ReadCheck
from penstock.pool.device_twin import DeviceTwin
from penstock.pool.node_backend import BlockOrigin
from penstock.pool.union.child import BlockEnded

Answer = TypeVar("Answer")
CAPACITY_BYTES = 1 << 40


class MemoryNode:
    """Contract: `pool.union.child.NodePool`. Several unions may have it; it outlives them."""

    read_bytes_per_s = 1e9
    block_bytes_max = 1 << 20
    takes_copies = False

    def __init__(self, place: str) -> None:
        self.place = place
        self.node_id = place.encode()
        self.up = True
        self.down_reason = "the test says so"
        self.siblings: list[str] = []
        self.held: dict[BlockKey, tuple[NewBlock, bytes]] = {}
        self.written = 0

    def _answer(self, answer: Callable[[], Answer]) -> Callable[[], Answer]:
        if not self.up:
            raise PoolError("network", f"{self.place} is down")
        return answer

    def _located(self, key: BlockKey) -> Located | None:
        found = self.held.get(key)
        return Located(found[0].size_bytes, (f"memory:0@{self.place}", f"net@{self.place}")) if found else None

    def watch_hot(self, on_hot: Callable[[Sequence[BlockKey]], None]) -> None:
        """It takes no copies, and counts no reads."""

    def begin_lookup(self, keys: Sequence[BlockKey], timeout_s: float) -> Callable[[], list[Located | None]]:
        return self._answer(lambda: [self._located(key) for key in keys])

    def lookup(self, keys: Sequence[BlockKey], timeout_s: float) -> list[Located | None]:
        return self.begin_lookup(keys, timeout_s)()

    def origins(self, keys: Sequence[BlockKey], timeout_s: float) -> list[BlockOrigin | None]:
        blocks = [self.held[key][0] if key in self.held else None for key in keys]
        return self._answer(
            lambda: [BlockOrigin(one.parent, one.tenant, one.rebuild_s) if one is not None else None for one in blocks]
        )()

    def read_block(
        self,
        key: BlockKey,
        size_bytes: int,
        into: memoryview,
        timeout_s: float,
        ended: BlockEnded,
        check: ReadCheck | None = None,
    ) -> None:
        found = self.held.get(key) if self.up else None
        if found is None:
            ended(0, b"", PoolError("missing" if self.up else "network", self.place))
            return
        into[: len(found[1])] = found[1]
        ended(0, found[0].mac, None)

    def read(
        self,
        key: BlockKey,
        size_bytes: int,
        into: memoryview,
        timeout_s: float,
        done: Done,
        check: ReadCheck | None = None,
    ) -> None:
        self.read_block(key, size_bytes, into, timeout_s, lambda *ended: done(ended[-1]), check)

    def read_many(
        self,
        keys: Sequence[BlockKey],
        size_bytes: int,
        intos: Sequence[memoryview],
        timeout_s: float,
        done: DoneMany,
        checks: Sequence[ReadCheck | None] | None = None,
    ) -> None:
        errors: list[PoolError | None] = []
        for key, into in zip(keys, intos, strict=True):
            self.read_block(key, size_bytes, into, timeout_s, lambda *ended: errors.append(ended[-1]))
        done(errors)

    def write(self, block: NewBlock, data: memoryview, timeout_s: float, done: Done) -> None:
        self.write_many([block], [data], timeout_s, lambda errors: done(errors[0]))

    def write_many(
        self, blocks: Sequence[NewBlock], datas: Sequence[memoryview], timeout_s: float, done: DoneMany
    ) -> None:
        if not self.up:
            done([PoolError("network", f"{self.place} is down")] * len(blocks))
            return
        for block, data in zip(blocks, datas, strict=True):
            self.held[block.key] = (block, bytes(data[: block.size_bytes]))
        self.written += len(blocks)
        done([None] * len(blocks))

    def begin_evict(self, keys: Sequence[BlockKey]) -> Callable[[], int]:
        return self._answer(lambda: sum(self.held.pop(key, None) is not None for key in keys))

    def evict(self, keys: Sequence[BlockKey]) -> int:
        return self.begin_evict(keys)()

    def begin_stat(self, timeout_s: float) -> Callable[[], PoolStat]:
        blocks = len(self.held)
        member = MemberStat("memory:0", "memory", CAPACITY_BYTES, 4096 * blocks, blocks, True, 1.0, 0, 0, 0)
        return self._answer(lambda: PoolStat((member,), 0, 0, 0))

    def stat(self, timeout_s: float) -> PoolStat:
        return self.begin_stat(timeout_s)()

    def suspect(self, key: BlockKey, checksum: int, mac: bytes, refused: bool) -> None:
        self.held.pop(key, None)

    def measure_bytes_per_s(self, budget_s: float) -> float:
        return self.read_bytes_per_s

    def register(self, buffer: memoryview, twin: DeviceTwin | None = None) -> None:
        """Nothing is read one-sided."""

    def lease(self, key: BlockKey) -> None:
        return None

    def host_buffers(self) -> list[memoryview]:
        return []

    def close(self, timeout_s: float) -> None:
        """It outlives its unions."""
