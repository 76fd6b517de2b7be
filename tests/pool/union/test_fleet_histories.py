"""Engines on 64 and 256 nodes while nodes are lost, come back with or without their blocks, join, leave and are
weighted anew, each engine learning of it at its own time: no wrong byte, and hits end only where a block is gone."""

from __future__ import annotations

import hashlib
import random

import pytest

from penstock.core.keys import BlockKey
from penstock.core.layout import staging_bytes
from penstock.io.memory import aligned_buffer
from penstock.pool.union.union_pool import UnionPool
from tests.pool.helpers import ROOT, WAIT_S, Outcome, new_block
from tests.pool.union.memory_nodes import MemoryNode

SIZE = 64
WEIGHT = 1e9
DOWN_MAX = 4
PREFIXES_KEPT = 25


def content(key: BlockKey) -> bytes:
    return hashlib.shake_128(key).digest(SIZE)


def staged_content(key: BlockKey) -> memoryview:
    buffer = aligned_buffer(staging_bytes(SIZE))
    buffer[:SIZE] = content(key)
    return buffer


class Fleet:
    """Nodes, and two engines that see them; an engine knows the changes in `late[engine]` not yet."""

    def __init__(self, nodes: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.nodes = [MemoryNode(f"10.0.{at // 250}.{at % 250}:7070") for at in range(nodes)]
        self.engines = [UnionPool(None, list(self.nodes), [WEIGHT] * nodes) for _ in range(2)]
        self.known = [{node.place for node in self.nodes} for _ in self.engines]
        self.late: list[list[tuple[str, MemoryNode, float]]] = [[], []]
        self.prefixes: list[list[BlockKey]] = [[]]
        self.made = 0
        self.lost_hits = 0

    def close(self) -> None:
        for engine in self.engines:
            engine.close(WAIT_S)

    # --- load ---

    def load(self, engine: int) -> None:
        """An engine looks a prompt up, reads what is there, and writes the rest."""
        keys = self.prompt()
        end = self.look_up(engine, keys)
        self.read(engine, keys[:end])
        outcome = Outcome()
        blocks = [new_block(key, keys[at - 1] if at else ROOT, SIZE, at) for at, key in enumerate(keys)][end:]
        if blocks:
            datas = [staged_content(block.key) for block in blocks]
            self.engines[engine].write_many(
                blocks, datas, WAIT_S, lambda errors: outcome(next(filter(None, errors), None))
            )
            assert outcome.reason() == "ok"
            assert self.look_up(engine, keys) == len(keys), "what was written is there"

    def prompt(self) -> list[BlockKey]:
        before = self.random.choice(self.prefixes)
        if before and self.random.random() < 0.3:
            return before
        base = before[: self.random.randrange(len(before) + 1)]
        self.made += 1
        keys = list(base)
        for at in range(self.random.choice([1, 5, 40, 150])):
            keys.append(hashlib.blake2b(repr((self.made, at)).encode(), digest_size=16).digest())
        self.prefixes = [*self.prefixes[-PREFIXES_KEPT:], keys]
        return keys

    def look_up(self, engine: int, keys: list[BlockKey]) -> int:
        """The end of the hits: exactly the first block that no node has which this engine knows and which is up."""
        before = self.end_of(engine, keys)
        hits = self.engines[engine].lookup(keys, WAIT_S)
        end = next((at for at, hit in enumerate(hits) if hit is None), len(keys))
        assert before <= end <= self.end_of(engine, keys), "moves may add copies meanwhile, nothing takes them away"
        self.lost_hits += end < len(keys)
        return end

    def end_of(self, engine: int, keys: list[BlockKey]) -> int:
        asked = [node for node in self.nodes if node.up and node.place in self.known[engine]]
        return next((at for at, key in enumerate(keys) if not any(key in node.held for node in asked)), len(keys))

    def read(self, engine: int, keys: list[BlockKey]) -> None:
        if not keys:
            return
        length = staging_bytes(SIZE)
        memory = aligned_buffer(length * len(keys))
        intos = [memory[at * length : at * length + SIZE] for at in range(len(keys))]
        outcome = Outcome()
        self.engines[engine].read_many(
            keys, SIZE, intos, WAIT_S, lambda errors: outcome(next(filter(None, errors), None))
        )
        assert outcome.reason() == "ok"
        assert all(bytes(into) == content(key) for key, into in zip(keys, intos, strict=True)), "wrong bytes"

    # --- changes ---

    def change(self) -> None:
        down = [node for node in self.nodes if not node.up]
        kind = self.random.choice(["lose", "lose", "back", "back", "wiped", "join", "leave", "weigh"])
        if kind == "lose" and len(down) < DOWN_MAX:
            self.random.choice([node for node in self.nodes if node.up]).up = False
        elif kind in ("back", "wiped") and down:
            node = self.random.choice(down)
            if kind == "wiped":
                node.held.clear()
            node.up = True
        elif kind == "join":
            node = MemoryNode(f"10.1.0.{len(self.nodes)}:7070")
            self.nodes.append(node)
            self.announce("join", node, WEIGHT)
        elif kind in ("leave", "weigh"):
            node = self.random.choice(self.nodes)
            if all(node.place in known for known in self.known) and not any(self.late):
                self.announce(kind, node, WEIGHT * self.random.choice([0.5, 1.5]))

    def announce(self, kind: str, node: MemoryNode, weight: float) -> None:
        for late in self.late:
            late.append((kind, node, weight))

    def learn(self, engine: int) -> None:
        """An engine hears of the oldest change that it does not know."""
        if not self.late[engine]:
            return
        kind, node, weight = self.late[engine].pop(0)
        union, known = self.engines[engine], self.known[engine]
        if kind == "join":
            union.add_node(node, weight)
            known.add(node.place)
        elif kind == "leave":
            union.drop_node(node.place, WAIT_S)
            known.discard(node.place)
        else:
            union.set_node_weight(node.place, weight)


@pytest.mark.parametrize(("nodes", "seed", "steps"), [(64, 1, 120), (64, 2, 120), (256, 3, 60)])
def test_hits_are_lost_only_where_they_lay_whatever_happens_to_the_nodes(nodes: int, seed: int, steps: int) -> None:
    fleet = Fleet(nodes, seed)
    try:
        for step in range(steps):
            engine = fleet.random.randrange(2)
            fleet.load(engine)
            if step % 3 == 1:
                fleet.change()
            if step % 2:
                fleet.learn(fleet.random.randrange(2))
        assert fleet.lost_hits > 5 and len(fleet.nodes) > nodes, "it had something to find out"
        for node in fleet.nodes:
            node.up = True
        for engine in range(2):
            while fleet.late[engine]:
                fleet.learn(engine)
            for keys in fleet.prefixes:
                fleet.read(engine, keys[: fleet.look_up(engine, keys)])
    finally:
        fleet.close()
