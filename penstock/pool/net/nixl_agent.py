"""An agent of NIXL over UCX for one-sided reads: by RDMA where there is a card, else by shared memory, never over TCP.

Needs the `nixl` extra. UCX would read over TCP too, where the peer's processor copies every byte: the agent leaves that
transport out, so that a peer that cannot be reached otherwise is an error, and its blocks are read over Penstock's own
connections. Service level and traffic class are settings of UCX (see `penstock fabric`), the same for all agents of
this process.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal

from penstock.core.config import ConfigError
from penstock.framing import said
from penstock.io.device_memory import DeviceMemory
from penstock.io.memory import address_of
from penstock.pool.api import PoolError
from penstock.pool.net.one_sided_agent import Access, Operation, RdmaTransport, Span
from penstock.pool.net.rdma_devices import RAILS_MAX, check_devices, numa_node_of, rdma_devices

log = logging.getLogger(__name__)

PROGRESS_US = 50_000  # interval at which the progress thread wakes without an event; at 0 it would use a whole core

_creating = threading.Lock()


class NixlAgent:
    """Contract: `one_sided_agent.OneSidedAgent`. Calls are made under a lock, as NIXL locks the whole agent too. Every
    peer may read and write all memory that is registered: NIXL knows no other registrations."""

    kind: RdmaTransport = "nixl"
    peers_of_connection = False

    def __init__(self, devices: Sequence[str] = ()) -> None:
        """`devices`: names of the RDMA devices to use (none: all). Raises ConfigError when NIXL is not installed, has
        no UCX, or a device is not there."""
        check_devices(devices)
        there = rdma_devices()
        self.transport: Literal["rdma", "shared memory"] = "rdma" if there else "shared memory"
        self.numa_node = numa_node_of(devices or there)  # where memory that the devices fill lies best
        if not there:  # with the libraries in NIXL's wheel, the process would crash at exit
            os.environ.setdefault("UCX_MODULES", "^ib")
        try:
            self._agent: Any = _agent(there, devices)
        except ImportError as error:
            raise ConfigError(f"NIXL cannot be imported: {error}; allowed: penstock[nixl] installed") from None
        except Exception as error:  # noqa: BLE001 (the binding raises types of its own)
            raise ConfigError(f"NIXL's agent does not start: {said(error)}") from None
        self._lock = threading.Lock()

    def register(self, memory: memoryview | DeviceMemory, access: Access = "read") -> Any:
        """Register memory; peers may read and write it, whatever `access` says."""
        if isinstance(memory, memoryview):
            memory = DeviceMemory(address_of(memory), len(memory), "DRAM")
        try:
            with self._lock:
                part = (memory.address, memory.size_bytes, memory.index, "")
                return self._agent.register_memory([part], memory.segment)
        except Exception as error:  # noqa: BLE001 (the binding raises types of its own)
            what = f"{memory.size_bytes} bytes of {'the GPU' if memory.segment == 'VRAM' else 'memory'}"
            raise PoolError("device", f"NIXL cannot register {what}: {said(error)}") from None

    def deregister(self, registration: Any) -> None:
        """As the contract says."""
        try:
            with self._lock:
                self._agent.deregister_memory(registration)
        except Exception as error:  # noqa: BLE001 (other registrations must still be undone)
            log.warning("NIXL: memory could not be deregistered: %s", error)

    def metadata(self) -> bytes:
        """NIXL's metadata of this agent."""
        with self._lock:
            found: bytes = self._agent.get_agent_metadata()
            return found

    def request(self) -> bytes:
        """Nothing: whoever has the metadata is a peer."""
        return b""

    def accept(self, request: bytes) -> tuple[bytes, Callable[[], bool]]:
        """Nothing, and nothing ends it."""
        return b"", lambda: False

    def add_peer(self, metadata: bytes, accepted: bytes = b"") -> Any:
        """Returns the peer's name."""
        try:
            with self._lock:
                return self._agent.add_remote_agent(metadata)
        except Exception as error:  # noqa: BLE001 (the binding raises types of its own)
            raise PoolError("network", f"NIXL cannot attach: {said(error)}") from None

    def remove_peer(self, name: Any) -> None:
        """As the contract says."""
        try:
            with self._lock:
                self._agent.remove_remote_agent(name)
        except Exception as error:  # noqa: BLE001 (the peer may have ended already)
            log.info("NIXL: %s was gone already: %s", name, error)

    def begin(
        self, operation: Operation, peer: Any, spans: Sequence[Span], local: DeviceMemory | None = None
    ) -> NixlTransfer:
        """As the contract says."""
        segment, index = ("DRAM", 0) if local is None else (local.segment, local.index)
        try:
            with self._lock:
                agent = self._agent
                ours = agent.get_xfer_descs([(here, size, index) for here, _, size in spans], segment)
                theirs = agent.get_xfer_descs([(there, size, 0) for _, there, size in spans], "DRAM")
                handle = agent.initialize_xfer(operation, ours, theirs, peer, b"")
                state = agent.transfer(handle)
        except Exception as error:  # noqa: BLE001 (the binding raises types of its own)
            raise PoolError("network", f"NIXL could not begin a {operation}: {said(error)}") from None
        return NixlTransfer(self._agent, self._lock, operation, handle, state)

    def close(self) -> None:
        """Nothing: NIXL releases them with the agent."""


class NixlTransfer:
    """Contract: `one_sided_agent.OneSidedTransfer`. It cannot be stopped."""

    __slots__ = ("_agent", "_handle", "_lock", "_operation", "_state")

    def __init__(self, agent: Any, lock: threading.Lock, operation: Operation, handle: Any, state: str) -> None:
        self._agent, self._lock, self._operation = agent, lock, operation
        self._handle, self._state = handle, state

    def ended(self) -> bool:
        """As the contract says."""
        if self._state == "PROC":
            try:
                with self._lock:
                    self._state = self._agent.check_xfer_state(self._handle)
            except Exception as error:  # noqa: BLE001 (the peer has ended: NIXL raises then)
                self._state = f"an error: {said(error)}"
        if self._state == "PROC":
            return False
        self._release()
        if self._state != "DONE":
            raise PoolError("network", f"a {self._operation} by NIXL ended as {self._state}")
        return True

    def _release(self) -> None:
        handle, self._handle = self._handle, None
        if handle is None:
            return
        try:
            with self._lock:
                self._agent.release_xfer_handle(handle)
        except Exception as error:  # noqa: BLE001 (the read has ended; only its handle stays)
            log.warning("NIXL: a transfer could not be released: %s", error)


def _agent(there: Sequence[str], devices: Sequence[str]) -> Any:
    """NIXL's own agent, with a progress thread that sleeps between its rounds."""
    import nixl_cu12._api as nixl

    logging.getLogger("nixl").setLevel(logging.WARNING)
    bindings: Any = nixl.nixlBind
    make = bindings.nixlAgent

    def with_pauses(name: str, config: Any) -> Any:
        config.pthrDelay = PROGRESS_US  # `nixl_agent` sets 0, and takes no other value
        return make(name, config)

    with _creating:
        bindings.nixlAgent = with_pauses
        try:
            made: Any = nixl.nixl_agent(
                f"penstock-{os.getpid()}-{secrets.token_hex(4)}",
                nixl.nixl_agent_config(enable_prog_thread=True, backends=[]),
            )
        finally:
            bindings.nixlAgent = make
    # Only with RDMA can UCX report the failure of a peer by itself; shared memory is refused in that mode. UCX spreads
    # each transfer over the devices, as many as there may be rails.
    rails = min(len(devices or there) or 1, RAILS_MAX)
    config = f"TLS=^tcp,MAX_RMA_RAILS={rails}"
    options = {"ucx_error_handling_mode": "peer" if there else "none", "engine_config": config}
    if devices:
        options["device_list"] = ",".join(devices)
    made.create_backend("UCX", options)
    return made
