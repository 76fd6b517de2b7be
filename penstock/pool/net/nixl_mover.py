"""One-sided reads between engines and relays with NIXL (`pool.net.nixl_agent`); the `nixl` extra."""

from __future__ import annotations

import logging
import time
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from penstock.core.config import ConfigError
from penstock.framing import NO_MESSAGE, said
from penstock.io.memory import address_of, aligned_buffer
from penstock.pool.api import PoolError
from penstock.pool.net.nixl_agent import NixlAgent
from penstock.pool.net.one_sided import RelayTransport, RemoteMemory
from penstock.pool.net.wire import ADDRESS_BYTES_MAX, Description

log = logging.getLogger(__name__)

_POLL_S = 20e-6
_ABANDON_S = 60.0  # interval of log lines about a transfer that neither ends nor fails


class AgentMemory(msgspec.Struct, array_like=True):
    """A peer's description of this agent's memory: NIXL's metadata of the agent, and the address and size of the
    memory."""

    metadata: Description
    address: Annotated[int, Meta(ge=0, extra={"bits": 64})]
    size_bytes: Annotated[int, Meta(ge=1, le=ADDRESS_BYTES_MAX)]


_descriptions = msgspec.msgpack.Decoder(AgentMemory)


class NixlMover:
    """Contract: `one_sided.Mover`. One NIXL agent."""

    kind: RelayTransport = "nixl"

    def __init__(self) -> None:
        """Raises ConfigError when NIXL is not installed or has no UCX."""
        try:
            self._agent = NixlAgent()
        except ConfigError as error:
            raise ConfigError(f"relay_transport is 'nixl', but {error}") from None
        self._registered: list[tuple[memoryview, Any]] = []

    def allocate(self, size_bytes: int) -> memoryview:
        """Page-aligned memory of `size_bytes`, registered with the agent."""
        memory = aligned_buffer(size_bytes)
        self._registered.append((memory, self._agent.register(memory)))
        return memory

    def export(self, memory: memoryview) -> bytes:
        """The agent's metadata, and address and size of memory of `allocate`, as bytes for `attach`."""
        return msgspec.msgpack.encode(AgentMemory(self._agent.metadata(), address_of(memory), len(memory)))

    def attach(self, description: bytes) -> RemoteMemory:
        """Memory that a peer exported. Raises PoolError("network") when its agent cannot be reached."""
        try:
            there = _descriptions.decode(description)
        except NO_MESSAGE as error:
            raise PoolError("network", f"NIXL cannot attach: {said(error)}") from None
        return _RemoteAgent(self._agent, self._agent.add_peer(there.metadata), there.address, there.size_bytes)

    def close(self) -> None:
        """Deregister all memory of `allocate`; a failure is logged."""
        registered, self._registered = self._registered, []
        for _, made in registered:
            self._agent.deregister(made)


class _RemoteAgent:
    """A peer's memory, read through its agent."""

    def __init__(self, agent: NixlAgent, name: Any, address: int, size_bytes: int) -> None:
        self._agent, self._name = agent, name
        self._address, self._size_bytes = address, size_bytes

    def read(self, offset: int, into: memoryview, timeout_s: float) -> None:
        size = len(into)
        if not 0 <= offset <= self._size_bytes - size:
            raise PoolError("layout", f"{size} bytes at {offset}; the peer's memory has {self._size_bytes}")
        deadline_s = time.monotonic() + timeout_s
        reading = self._agent.begin("READ", self._name, [(address_of(into), self._address + offset, size)])
        next_line_s = time.monotonic() + _ABANDON_S
        while not reading.ended():
            time.sleep(_POLL_S)
            if time.monotonic() > next_line_s:
                log.error("a read by NIXL of %s neither ends nor fails", self._name)
                next_line_s += _ABANDON_S
        if time.monotonic() > deadline_s:
            raise PoolError("deadline", "a read by NIXL ended after its deadline")

    def close(self) -> None:
        self._agent.remove_peer(self._name)
