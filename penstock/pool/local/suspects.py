"""Blocks of a node that a reader reports as damaged, or as refused by its MAC check.

The node has no pool key, so it cannot verify a MAC, and anybody with the node's secret can send such a report.

SUS-1  Statement: No report drops a block that matches its checksum: a block reported as damaged is read here first.
SUS-2  Statement: A refused block stays, and is replaced by the next write under its key that has another MAC. So a
       forged block costs one load, and a false report about a good block costs nothing until its key is written again.
Verification: tests/pool/local/test_suspects.py.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

from penstock.core.keys import BlockKey
from penstock.core.new_block import NewBlock
from penstock.io.memory import aligned_buffer
from penstock.pool.api import PoolError
from penstock.pool.block import Block
from penstock.pool.losses import note_loss

if TYPE_CHECKING:
    from penstock.pool.local.local_pool import LocalPool
    from penstock.pool.local.pinned_block import OpenBlock

LOOKS_MAX = 2  # reported blocks that are read at the same time
WAITING_MAX = 1024  # reports that wait; a further one is dropped, as the next reader reports it again
LOOK_TIMEOUT_S = 10.0
REFUSED_MAX = 4096  # refused blocks remembered, the latest ones


class Suspects:
    """Reported blocks of one pool. Any thread may call; `gives_way` with the pool's lock held."""

    def __init__(self, pool: LocalPool) -> None:
        self._pool = pool
        self._lock = threading.Lock()
        self._looks = 0
        self._waiting: OrderedDict[BlockKey, int] = OrderedDict()  # key -> the checksum that the report names
        self._refused: OrderedDict[BlockKey, bytes] = OrderedDict()  # key -> the refused MAC

    def damaged(self, key: BlockKey, checksum: int) -> None:
        """Read the block, soon, and drop it if it does not match this checksum, which it was stored with."""
        with self._lock:
            if len(self._waiting) < WAITING_MAX:
                self._waiting.setdefault(key, checksum)
        self._verify_next()

    def _verify_next(self) -> None:
        while True:
            with self._lock:
                if self._looks >= LOOKS_MAX or not self._waiting:
                    return
                key, checksum = self._waiting.popitem(last=False)
                self._looks += 1
            opened = self._pool.open_block(key, None)
            if isinstance(opened, PoolError):
                self._end(None)
            elif opened.checksum != checksum:  # the block was replaced since
                self._end(opened)
            elif opened.view is not None:
                self._seen(opened, opened.view, None)
            else:
                self._load(opened)

    def _load(self, opened: OpenBlock) -> None:
        try:
            buffer = aligned_buffer(opened.block.extent_bytes)
        except Exception as error:  # noqa: BLE001 (no memory: the next reader reports it again)
            note_loss("suspects_not_read", "", "suspect block %s is not verified: %r", opened.key.hex(), error)
            self._end(opened)
            return

        def loaded(error: PoolError | None) -> None:
            self._seen(opened, buffer, error)
            self._verify_next()

        self._pool.load(opened, buffer, LOOK_TIMEOUT_S, loaded)

    def _seen(self, opened: OpenBlock, data: memoryview, error: PoolError | None) -> None:
        try:
            if error is None:
                self._pool.verify(opened.block, data)
        finally:
            self._end(opened)

    def _end(self, opened: OpenBlock | None) -> None:
        if opened is not None:
            opened.release()
        with self._lock:
            self._looks -= 1

    def refuse(self, key: BlockKey, mac: bytes) -> None:
        """Remember that the block with this MAC may be replaced."""
        with self._lock:
            self._refused[key] = mac
            self._refused.move_to_end(key)
            while len(self._refused) > REFUSED_MAX:
                self._refused.popitem(last=False)

    def gives_way(self, present: Block, new: NewBlock) -> bool:
        """Whether `new` replaces the block that is present; the report is then forgotten."""
        with self._lock:
            refused = self._refused.get(present.key)
            if refused is None:
                return False
            if refused != present.mac:  # the block was replaced since
                del self._refused[present.key]
                return False
            if not new.mac or new.mac == present.mac:
                return False
            del self._refused[present.key]
            return True
