"""What the tests of the data paths share: a pool node, engine hosts around it in this process, questions to them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from penstock.cluster.engine.build_host import HostConfig, open_host
from penstock.cluster.engine.host import EngineHost
from penstock.cluster.messages import PlacedRequest
from penstock.cluster.settings import Role
from penstock.core.packed_tokens import pack_tokens
from penstock.engine.config import EngineConfig
from penstock.engine.runner import SamplingParams
from penstock.pool.net.node import PoolNode
from penstock.pool.net.tls import PeerTls
from penstock.pool.setup.open import open_local_pool
from tests.asking import WAIT_S, Answer

BLOCK = 16
MIB = 1 << 20
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)

_ids = itertools.count(1)


class Question:
    """A request on its way over two engines."""

    def __init__(self, prefill: Answer, decode: Answer, request_id: str) -> None:
        self.prefill, self.decode, self.request_id = prefill, decode, request_id

    def answer(self) -> list[int]:
        assert self.prefill.wait().finish_reason == "handed_over", self.prefill.last
        assert self.decode.wait().finish_reason == "length", self.decode.last
        return self.prefill.tokens + self.decode.tokens


class Cluster:
    """Prefill and decode engines over one pool node; all bytes go over loopback."""

    def __init__(self, node: PoolNode) -> None:
        self.node = node
        self.prefill: list[EngineHost] = []
        self.decode: list[EngineHost] = []

    @property
    def block_bytes(self) -> int:
        return self.hosts[0].engine.config.block_bytes

    @property
    def hosts(self) -> list[EngineHost]:
        return [*self.prefill, *self.decode]

    def start(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams = GREEDY,
        pe: int = 0,
        de: int = 0,
        order: str = "pd",
        **more: Any,
    ) -> Question:
        """Place both parts, the prefill engine's first or last (`order`)."""
        request_id = more.pop("request_id", f"q{next(_ids)}")
        parts = {"p": Answer(), "d": Answer()}
        for which in order:
            host, part = (self.prefill[pe], "prefill") if which == "p" else (self.decode[de], "decode")
            self.place(host, part, parts[which], prompt, sampling, de, request_id=request_id, **more)
        return Question(parts["p"], parts["d"], request_id)

    def place(
        self,
        host: EngineHost,
        part: Any,
        on_event: Answer,
        prompt: Sequence[int],
        sampling: SamplingParams = GREEDY,
        de: int = 0,
        **more: Any,
    ) -> None:
        """Place one part."""
        given = {"request_id": f"q{next(_ids)}", "decode_relay": self.decode[de].relay_address} | more
        placed = PlacedRequest(epoch=1, part=part, prompt=pack_tokens(prompt), sampling=sampling, **given)
        host.submit(placed, on_event)

    def settle(self) -> None:
        """Nothing is left anywhere, and nothing leaked."""
        for host in self.hosts:
            assert host.wait_idle(WAIT_S)
            host.check_integrity()
            report = host.report()
            assert report.unfinished == report.tokens == report.read_queue_bytes == 0
            assert report.free_pages == report.total_pages
            assert report.buffer_free_blocks == report.buffer_blocks


def engine_config(checkpoint: Path, node: PoolNode, **more: Any) -> EngineConfig:
    given: dict[str, Any] = {
        "model": str(checkpoint),
        "dtype": "float32",
        "device": "cpu",
        "pool": (f"127.0.0.1:{node.address[1]}",),
        "block_tokens": BLOCK,
        "kv_memory_bytes": 2 * MIB,
        "staging_bytes": MIB // 2,
        "max_batch_tokens": 64,
    }
    return EngineConfig(**(given | more))


@contextlib.contextmanager
def cluster(checkpoint: Path, pool_bytes: int = 32 * MIB, tls: PeerTls | None = None, **more: Any) -> Iterator[Cluster]:
    """xPyD around one pool node, which may ask for `tls`; settings as of `beside`."""
    local = open_local_pool((pool_bytes,), ())
    node = PoolNode(local, "127.0.0.1", 0, staging_capacity_bytes=8 * MIB, tls=tls)
    try:
        with beside(checkpoint, Cluster(node), **more) as made:
            yield made
    finally:
        node.close(5.0)
        local.close(5.0)


@contextlib.contextmanager
def beside(
    checkpoint: Path,
    other: Cluster,
    prefills: int = 1,
    decodes: int = 1,
    settle: bool = True,
    engine: dict[str, Any] | None = None,
    host: dict[str, Any] | None = None,
) -> Iterator[Cluster]:
    """New engines around the same pool node. `host` are settings of HostConfig, `engine` of EngineConfig."""
    made = Cluster(other.node)
    config = HostConfig(engine_config(checkpoint, other.node, **(engine or {})), buffer_bytes=2 * MIB)
    config = replace(config, **(host or {}))
    try:
        for role, count, hosts in (("prefill", prefills, made.prefill), ("decode", decodes, made.decode)):
            for _ in range(count):
                hosts.append(open_host(replace(config, role=_role(role))))
        yield made
        if settle:
            made.settle()
    finally:
        for opened in made.hosts:
            opened.close(5.0)


def _role(name: str) -> Role:
    return "prefill" if name == "prefill" else "decode"


@contextlib.contextmanager
def mixed(checkpoint: Path, node: PoolNode, **more: Any) -> Iterator[Callable[..., list[int]]]:
    """One mixed engine; asks for the tokens of a prompt."""
    opened = open_host(HostConfig(engine_config(checkpoint, node, **more)))

    def ask(prompt: Sequence[int], sampling: SamplingParams = GREEDY, **placed: Any) -> list[int]:
        part = Answer()
        request = PlacedRequest(
            request_id=f"m{next(_ids)}", epoch=1, prompt=pack_tokens(prompt), sampling=sampling, **placed
        )
        opened.submit(request, part)
        assert part.wait().finish_reason == "length", part.last
        return part.tokens

    try:
        yield ask
    finally:
        opened.close(5.0)
