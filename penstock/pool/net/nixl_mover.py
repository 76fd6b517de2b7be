"""One-sided reads by NIXL (UCX: RDMA where there is a card, shared memory or TCP elsewhere); the `nixl` extra.

NIXL's progress thread takes a core while bytes move. Service levels and traffic classes are UCX's settings (see
`penstock fabric`): this process's connections all have the same one.
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
_ABANDON_S = 60.0  # a transfer that neither ends nor fails for so long is told at each such interval


class AgentMemory(msgspec.Struct, array_like=True):
    """What a peer needs to read memory of this agent: NIXL's metadata of the agent, and where the memory lies."""

    metadata: Description
    address: Annotated[int, Meta(ge=0, extra={"bits": 64})]
    size_bytes: Annotated[int, Meta(ge=1, le=ADDRESS_BYTES_MAX)]


_descriptions = msgspec.msgpack.Decoder(AgentMemory)


def _leave_out_verbs() -> None:
    """Without an RDMA device UCX shall not load its verbs module: with the libraries that NIXL's wheel brings, the
    process would crash as it exits."""
    if not _RDMA_DEVICES.is_dir() or not any(_RDMA_DEVICES.iterdir()):
        os.environ.setdefault("UCX_MODULES", "^ib")


class NixlMover:
    """Contract: `one_sided.Mover`. One agent of this process, used under a lock: NIXL's own is coarse as well."""

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
        """The agent's metadata and the place of memory of `allocate`, as bytes for `attach`."""
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
                except Exception as error:  # noqa: BLE001 (the other registrations are still to be undone)
                    log.warning("NIXL: memory could not be deregistered: %s", error)
            self._registered.clear()


class _RemoteAgent:
    """A peer's memory behind its agent."""

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
            raise PoolError("deadline", "a read by NIXL came late")

    def _wait(self, handle: Any, state: str) -> str:
        """Until the transfer ended: bytes that are on their way may still land before."""
        told_s = time.monotonic() + _ABANDON_S
        try:
            while state == "PROC":
                time.sleep(_POLL_S)
                with self._lock:
                    state = self._agent.check_xfer_state(handle)
                if time.monotonic() > told_s:
                    log.error("a read by NIXL of %s neither ends nor fails", self._name)
                    told_s += _ABANDON_S
            return state
        except Exception as error:  # noqa: BLE001 (the peer is gone: NIXL raises instead of a state)
            return f"an error: {error}"
        finally:
            try:
                with self._lock:
                    self._agent.release_xfer_handle(handle)
            except Exception as error:  # noqa: BLE001 (the read has ended, with or without its handle)
                log.warning("NIXL: a transfer could not be released: %s", error)

    def close(self) -> None:
        try:
            with self._lock:
                self._agent.remove_remote_agent(self._name)
        except Exception as error:  # noqa: BLE001 (the peer may be gone already)
            log.info("NIXL: %s was gone already: %s", self._name, error)
