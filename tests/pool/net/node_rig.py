"""Pool nodes in this process, and clients that speak the protocol by hand."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path
from typing import Any

from penstock.core.keys import KEY_BYTES
from penstock.core.spans import SPAN_BYTES_MAX
from penstock.pool.api import PoolError
from penstock.pool.local.local_pool import LocalPool
from penstock.pool.net import wire
from penstock.pool.net.node import PoolNode
from penstock.pool.net.remote import RemotePool
from penstock.pool.setup.open import open_local_pool
from tests.waiting import read_until_ended

MIB = 1 << 20
WAIT_S = 30.0


def fit_span(cls: type, value: dict[str, Any]) -> dict[str, Any]:
    """The made-up fields of a message, those of a span for as many blocks as it has keys."""
    if cls is wire.Commit:
        return value | {"span": fit_span(wire.WriteMany, value["span"])}
    if cls is wire.Grant:
        return value | {"size_bytes": min(value["size_bytes"], SPAN_BYTES_MAX // value["blocks"])}
    if cls not in (wire.ReadMany, wire.WriteMany, wire.Blocks):
        return value
    blocks = max(1, len(value["keys"]) // KEY_BYTES)
    lengths = {"keys": KEY_BYTES, "parents": KEY_BYTES, "checksums": wire.CHECKSUM_BYTES, "states": 1}
    for name in value.keys() & lengths.keys():
        value[name] = value[name][: blocks * lengths[name]].ljust(blocks * lengths[name], b"k")
    for name in value.keys() & {"positions", "rebuilds_s", "macs"}:
        value[name] = (value[name] * blocks or [0] * blocks)[:blocks] if value[name] or name != "macs" else []
    if "states" in value:
        value["states"] = bytes(state % (1 + len(PoolError.REASONS)) for state in value["states"])
    if "size_bytes" in value:
        value["size_bytes"] = min(value["size_bytes"], SPAN_BYTES_MAX // blocks)
    return value


class NodeRig:
    """Pools, nodes and clients, closed in reverse order."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.undo = contextlib.ExitStack()

    def pool(self, memory: int = 8 * MIB, slab: int = 0) -> LocalPool:
        slabs = [(self._folder / "kv.slab", slab)] if slab else []
        pool = open_local_pool([memory] if memory else [], slabs, weights=[1.0] * (bool(memory) + bool(slab)))
        self.undo.callback(pool.close, 5.0)
        return pool

    def node(self, pool: Any = None, **options: Any) -> PoolNode:
        node = PoolNode(pool if pool is not None else self.pool(), "127.0.0.1", 0, **options)
        self.undo.callback(node.close, 5.0)
        return node

    def client(self, node: PoolNode) -> RemotePool:
        client = RemotePool(*node.address)
        self.undo.callback(client.close, 5.0)
        return client

    def by_hand(self, node: PoolNode, lane: str | None = "read", source: str = "127.0.0.1") -> HandMade:
        """`source`: the address that it comes from; all of 127.0.0.0/8 are this host's."""
        made = HandMade(node.address, lane, source)
        self.undo.callback(made.sock.close)
        return made


class HandMade:
    """A client's end of one connection: greeted, with a lane unless that is None."""

    def __init__(self, address: tuple[str, int], lane: str | None, source: str = "127.0.0.1") -> None:
        self.sock = socket.create_connection(address, WAIT_S, (source, 0))
        self.frames = wire.FrameReader(self.sock)
        self.sock.sendall(wire.greeting())
        wire.receive_exactly(self.sock, memoryview(bytearray(wire.GREETING.size)))
        if lane is not None:
            self.send(wire.Hello(lane))
            assert isinstance(self.reply(), wire.Ready)

    def send(self, message: wire.Request, payload: bytes = b"", payload_bytes: int | None = None) -> None:
        size = len(payload) if payload_bytes is None else payload_bytes
        self.sock.sendall(wire.frame(message, size) + payload)

    def reply(self) -> wire.Reply:
        header, payload_bytes = self.frames.next()
        reply = wire.decode_reply(header)
        if payload_bytes:
            wire.receive_exactly(self.sock, memoryview(bytearray(payload_bytes)))
        return reply

    def until_ended(self) -> None:
        """Wait until the node ends the connection; fails with TimeoutError when it does not."""
        read_until_ended(self.sock)
