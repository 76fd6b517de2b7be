"""One-sided reads with NIXL over UCX (RDMA where a card is present, else shared memory or TCP); the `nixl` extra.

NIXL's progress thread uses one core during transfers. Service level and traffic class are settings of UCX (see
`penstock fabric`), and the same for all connections of this process.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from penstock.core.config import ConfigError
from penstock.framing import said
from penstock.io.memory import address_of, aligned_buffer
from penstock.pool.api import PoolError
from penstock.pool.net.one_sided import RelayTransport, RemoteMemory
from penstock.pool.net.wire import ADDRESS_BYTES_MAX, Description

log = logging.getLogger(__name__)

_POLL_S = 20e-6
_RDMA_DEVICES = Path("/sys/class/infiniband")
_ABANDON_S = 60.0  # interval of log lines about a transfer that neither ends nor fails


class AgentMemory(msgspec.Struct, array_like=True):
    """A peer's description of this agent's memory: NIXL's metadata of the agent, and the address and size of the
    memory."""

    metadata: Description
    address: Annotated[int, Meta(ge=0, extra={"bits": 64})]
    size_bytes: Annotated[int, Meta(ge=1, le=ADDRESS_BYTES_MAX)]


_descriptions = msgspec.msgpack.Decoder(AgentMemory)


def _leave_out_verbs() -> None:
    """Stop UCX from loading its verbs module where there is no RDMA device: with the libraries in NIXL's wheel, the
    process would crash at exit."""
    if not _RDMA_DEVICES.is_dir() or not any(_RDMA_DEVICES.iterdir()):
        os.environ.setdefault("UCX_MODULES", "^ib")


class NixlMover:
    """Contract: `one_sided.Mover`. One NIXL agent, used under a lock, as NIXL locks the whole agent too."""

    kind: RelayTransport = "nixl"

    def __init__(self) -> None:
        """Raises ConfigError when NIXL is not installed or has no UCX."""
        _leave_out_verbs()
        try:
            from nixl_cu12._api import nixl_agent, nixl_agent_config
        except ImportError as error:
            raise ConfigError(
                f"relay_transport is 'nixl', but NIXL cannot be imported: {error}; allowed: penstock[nixl] installed"
            ) from None
        logging.getLogger("nixl").setLevel(logging.WARNING)
        name = f"penstock-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            self._agent: Any = nixl_agent(name, nixl_agent_config(enable_prog_thread=True, backends=["UCX"]))
        except Exception as error:  # noqa: BLE001 (the binding raises types of its own)
            raise ConfigError(f"relay_transport is 'nixl', but its agent does not start: {error}") from None
        self._lock = threading.Lock()
        self._registered: list[tuple[memoryview, Any]] = []

    def allocate(self, size_bytes: int) -> memoryview:
        """Page-aligned memory of `size_bytes`, registered with the agent."""
        memory = aligned_buffer(size_bytes)
        with self._lock:
            made = self._agent.register_memory([(address_of(memory), size_bytes, 0, "")], "DRAM")
        self._registered.append((memory, made))
        return memory

    def export(self, memory: memoryview) -> bytes:
        """The agent's metadata, and address and size of memory of `allocate`, as bytes for `attach`."""
        with self._lock:
            metadata = self._agent.get_agent_metadata()
        return msgspec.msgpack.encode(AgentMemory(metadata, address_of(memory), len(memory)))

    def attach(self, description: bytes) -> RemoteMemory:
        """Memory that a peer exported. Raises PoolError("network") when its agent cannot be reached."""
        try:
            there = _descriptions.decode(description)
            with self._lock:
                name = self._agent.add_remote_agent(there.metadata)
        except Exception as error:  # noqa: BLE001 (the binding raises types of its own)
            raise PoolError("network", f"NIXL cannot attach: {said(error)}") from None
        return _RemoteAgent(self._agent, self._lock, name, there.address, there.size_bytes)

    def close(self) -> None:
        """Deregister all memory of `allocate`; a failure is logged."""
        with self._lock:
            for _, made in self._registered:
                try:
                    self._agent.deregister_memory(made)
                except Exception as error:  # noqa: BLE001 (the other registrations must still be undone)
                    log.warning("NIXL: memory could not be deregistered: %s", error)
            self._registered.clear()


class _RemoteAgent:
    """A peer's memory, read through its agent."""

    def __init__(self, agent: Any, lock: threading.Lock, name: Any, address: int, size_bytes: int) -> None:
        self._agent, self._lock = agent, lock
        self._name = name
        self._address, self._size_bytes = address, size_bytes

    def read(self, offset: int, into: memoryview, timeout_s: float) -> None:
        size = len(into)
        if not 0 <= offset <= self._size_bytes - size:
            raise PoolError("layout", f"{size} bytes at {offset}; the peer's memory has {self._size_bytes}")
        deadline_s = time.monotonic() + timeout_s
        try:
            with self._lock:
                agent = self._agent
                local = agent.get_xfer_descs([(address_of(into), size, 0)], "DRAM")
                remote = agent.get_xfer_descs([(self._address + offset, size, 0)], "DRAM")
                handle = agent.initialize_xfer("READ", local, remote, self._name, b"")
                state = agent.transfer(handle)
        except Exception as error:  # noqa: BLE001 (the binding raises types of its own)
            raise PoolError("network", f"NIXL could not begin a read: {error}") from None
        state = self._wait(handle, state)
        if state != "DONE":
            raise PoolError("network", f"a read by NIXL ended as {state}")
        if time.monotonic() > deadline_s:
            raise PoolError("deadline", "a read by NIXL ended after its deadline")

    def _wait(self, handle: Any, state: str) -> str:
        """Wait until the transfer has ended: before that, bytes may still be written."""
        next_line_s = time.monotonic() + _ABANDON_S
        try:
            while state == "PROC":
                time.sleep(_POLL_S)
                with self._lock:
                    state = self._agent.check_xfer_state(handle)
                if time.monotonic() > next_line_s:
                    log.error("a read by NIXL of %s neither ends nor fails", self._name)
                    next_line_s += _ABANDON_S
            return state
        except Exception as error:  # noqa: BLE001 (the peer has ended: NIXL raises then)
            return f"an error: {error}"
        finally:
            try:
                with self._lock:
                    self._agent.release_xfer_handle(handle)
            except Exception as error:  # noqa: BLE001 (the read has ended; only its handle stays)
                log.warning("NIXL: a transfer could not be released: %s", error)

    def close(self) -> None:
        try:
            with self._lock:
                self._agent.remove_remote_agent(self._name)
        except Exception as error:  # noqa: BLE001 (the peer may have ended already)
            log.info("NIXL: %s was gone already: %s", self._name, error)
