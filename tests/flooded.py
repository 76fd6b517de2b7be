"""A process with one port that the tests flood: `python -m tests.flooded pool|relay|router|vllm`, or, with what
`tests.pool.net.attacks` measures, `attacked-pool FOLDER|attacked-relay`.

It prints where it listens (of vLLM's link: the engine's id), serves until its standard input ends, and has no more in
it than that port needs.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from penstock.cluster import wire as cluster_wire
from penstock.cluster.handoff.buffer import DecodeBuffer
from penstock.cluster.handoff.incoming import Incoming
from penstock.cluster.handoff.relay import RelayNode
from penstock.cluster.router.engine_registry import EngineRegistry, RegisteredEngine
from penstock.pool.net.node import PoolNode
from penstock.pool.net.secret import Secret
from penstock.pool.net.shared_memory import SharedMemoryMover
from penstock.pool.setup.open import open_local_pool
from penstock.process.file_limit import raise_file_limit
from penstock.process.startup_objects import freeze_startup_objects
from penstock.vllm.accepting import accept_scheduler
from penstock.vllm.link import listen

SECRET = Secret(b"the secret of the flooded ports")
BLOCK_BYTES = 4096
ENGINE_ID = "flooded"
ATTACKED_BLOCK_BYTES = 256 << 10
ATTACKED_KEYS = [number.to_bytes(16, "big") for number in range(1, 17)]  # that a relay has room for


def _say(place: str) -> None:
    freeze_startup_objects()  # as each command does
    print(place, flush=True)


def _until_the_end() -> None:
    sys.stdin.read()


def pool() -> None:
    node = PoolNode(open_local_pool([8 << 20], []), "127.0.0.1", 0)
    _say(node.place)
    _until_the_end()


def attacked_pool() -> None:
    """Members of both kinds: what lies on a drive goes through staging memory."""
    storage = open_local_pool([256 << 20], [(Path(sys.argv[2]) / "kv.slab", 256 << 20)], weights=[1.0, 1.0])
    node = PoolNode(storage, "127.0.0.1", 0, secret=SECRET)
    _say(node.place)
    _until_the_end()


def relay(block_bytes: int = BLOCK_BYTES, secret: Secret | None = None, expected: Sequence[bytes] = ()) -> None:
    """`expected`: blocks of a hand-off for which there is room."""
    storage = open_local_pool([1 << 20], [])
    mover = SharedMemoryMover()
    buffer = DecodeBuffer(block_bytes, 64, storage, mover.allocate)
    if expected:
        buffer.reserve("expected", expected, lambda: None)
    engine: Any = SimpleNamespace()
    incoming = Incoming(engine, buffer, storage, 600.0, 2.0)
    node = RelayNode(buffer, incoming, "127.0.0.1", 0, secret=secret, mover=mover)
    _say(node.place)
    _until_the_end()


def attacked_relay() -> None:
    relay(ATTACKED_BLOCK_BYTES, SECRET, ATTACKED_KEYS)


class _Listener:
    """Takes every engine, and asks nothing of it."""

    def engine_fits(self, card: cluster_wire.EngineCard) -> str | None:
        return None

    def engine_joined(self, engine: RegisteredEngine, held: Sequence[cluster_wire.Held]) -> list[tuple[str, int]]:
        return []

    def engine_left(self, engine: RegisteredEngine, why: str) -> None:
        """Nothing was placed there."""

    def engine_reported(self, engine: RegisteredEngine) -> None:
        """Nobody asks."""

    def engine_events(self, engine: RegisteredEngine, events: Sequence[cluster_wire.Event]) -> int:
        """Of nothing that was placed."""
        return 0


def router() -> None:
    sock = socket.create_server(("127.0.0.1", 0))

    async def serve() -> None:
        port = EngineRegistry(_Listener(), sock, SECRET, 3.0)
        await port.start()
        _say(f"127.0.0.1:{sock.getsockname()[1]}")
        await asyncio.get_running_loop().run_in_executor(None, _until_the_end)
        await port.close()

    asyncio.run(serve())


def vllm() -> None:
    """Waits for its scheduler, and for another one after it has come."""
    listener = listen(ENGINE_ID, 0)

    def accept() -> None:
        while (link := accept_scheduler(listener, ENGINE_ID, lambda: False)) is not None:
            link.drain()
            link.close()

    threading.Thread(target=accept, daemon=True).start()
    _say(ENGINE_ID)
    _until_the_end()


if __name__ == "__main__":
    logging.basicConfig(level="WARNING")
    raise_file_limit()
    kinds: dict[str, Callable[[], None]] = {"pool": pool, "relay": relay, "router": router, "vllm": vllm}
    (kinds | {"attacked-pool": attacked_pool, "attacked-relay": attacked_relay})[sys.argv[1]]()
