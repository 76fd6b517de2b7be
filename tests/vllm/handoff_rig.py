"""A decode host beside a connector under test: a real buffer and relay, and the agent's end of its socket."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from penstock.cluster.agent_wire import HandOffEnded, HandOffParams, blocks_text
from penstock.cluster.handoff.buffer import DecodeBuffer
from penstock.cluster.handoff.relay import RelayNode
from penstock.cluster.handoff.relay_links import RelayLinks
from penstock.cluster.vllm_agent.block_mover import BlockMover
from penstock.cluster.vllm_agent.connector_port import ConnectorPort
from penstock.core.keys import KeyChain, root_key
from penstock.pool.api import Pool, PoolError
from penstock.units import format_address
from tests.waiting import wait_until

HAS, CAN_READ = 1, 2


class _NoService:
    """Hand-offs are opened and closed by the test itself, not over the relay."""

    def opening(
        self, name: str, reads: bool, timeout_s: float, reply: Callable[[bytes | PoolError], None], source: str = ""
    ) -> Callable[[], None]:
        reply(PoolError("missing", "not in this test"))
        return lambda: None

    def handed_over(self, name: str, token: int, missing: int) -> PoolError | None:
        return PoolError("missing", "not in this test")


class DecodeHost:
    """Buffer and relay over `storage`."""

    def __init__(self, block_bytes: int, storage: Pool, blocks: int = 128) -> None:
        self.storage = storage
        self.buffer = DecodeBuffer(block_bytes, blocks, storage)
        self.relay = RelayNode(self.buffer, _NoService(), "127.0.0.1", 0)
        self.address = format_address(*self.relay.address)

    def reserve(self, name: str, keys: Sequence[bytes]) -> None:
        granted: list[str] = []
        self.buffer.reserve(name, keys, lambda: granted.append(name))
        assert granted, "no room"

    def states(self, keys: Sequence[bytes], reads: bool) -> str:
        """What `Incoming` answers an opening with, as digits."""
        here = self.buffer.has(keys)
        found = self.storage.lookup(list(keys), 5.0) if reads else [None] * len(keys)
        states = (HAS if h else CAN_READ if hit else 0 for h, hit in zip(here, found, strict=True))
        return blocks_text(bytes(states))

    def close(self) -> None:
        self.relay.close()


class TestAgent:
    """The agent's side of one connector."""

    __test__ = False

    def __init__(self) -> None:
        self.links = RelayLinks()
        self.mover = BlockMover(self.links)
        self.port = ConnectorPort(self.mover)
        self.ended: dict[str, HandOffEnded] = {}

    def keys(self, prompt: Sequence[int], salt: str = "") -> list[bytes]:
        assert self.port.greeted.wait(30.0), "no connector came"
        hello = self.port.hello
        assert hello is not None
        return KeyChain(root_key(hello.fingerprint, salt), hello.block_tokens).extend(prompt)

    def prefill(self, name: str, relay: str, blocks: str, **plan: object) -> HandOffParams:
        def ended(message: HandOffEnded) -> None:
            assert message.name not in self.ended, "a hand-off ended twice"
            self.ended[message.name] = message

        self.port.await_end(name, ended)
        return HandOffParams(token=self.port.token, part="prefill", name=name, relay=relay, blocks=blocks, **plan)  # type: ignore[arg-type]

    def decode(self, name: str, relay: str, blocks: str) -> HandOffParams:
        return HandOffParams(token=self.port.token, part="decode", name=name, relay=relay, blocks=blocks)

    def wait_ended(self, name: str, timeout_s: float = 30.0) -> HandOffEnded:
        wait_until(lambda: name in self.ended, f"the hand-off {name} ended", timeout_s)
        return self.ended[name]

    def close(self) -> None:
        self.port.close()
        self.mover.close(5.0)
        self.links.close(5.0)
