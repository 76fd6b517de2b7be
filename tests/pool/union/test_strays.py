"""Blocks beside their owners after the map has changed: found at their former owners, without asking a whole fleet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest

from penstock.core.keys import BlockKey
from penstock.core.pool.strays import WATCH_LOOKUPS
from penstock.pool.api import Located
from penstock.pool.union.union_pool import UnionPool
from tests.pool.helpers import ROOT, Outcome, chain, new_block, staged
from tests.pool.union.memory_nodes import MemoryNode

NODES = 40
BLOCKS = 8
PREFIXES = 200


class CountingNode(MemoryNode):
    """Counts the lookups that it is asked to answer."""

    asked = 0

    def begin_lookup(self, keys: Sequence[BlockKey], timeout_s: float) -> Callable[[], list[Located | None]]:
        self.asked += 1
        return super().begin_lookup(keys, timeout_s)


@pytest.fixture
def nodes() -> list[CountingNode]:
    return [CountingNode(f"10.0.0.{at}:7801") for at in range(NODES + 1)]


@pytest.fixture
def unions(nodes: list[CountingNode]) -> Iterator[list[UnionPool]]:
    made = [UnionPool(None, nodes[:NODES], [1e9] * NODES) for _ in range(2)]
    yield made
    for one in made:
        one.close(5.0)


def prefix(name: object) -> list[BlockKey]:
    return [key for key, _ in chain(name, BLOCKS)]


def store(pool: UnionPool, keys: Sequence[BlockKey]) -> None:
    blocks = [new_block(key, parent) for key, parent in zip(keys, [ROOT, *keys], strict=False)]
    ended = Outcome()
    datas = [staged(block.key, 4096) for block in blocks]
    pool.write_many(blocks, datas, 20.0, lambda errors: ended(next(filter(None, errors), None)))
    assert ended.reason(30.0) == "ok"


def asked_by(nodes: list[CountingNode], pool: UnionPool, keys: Sequence[BlockKey]) -> tuple[int, bool]:
    """How many questions a lookup costs, and whether all blocks were found."""
    before = sum(node.asked for node in nodes)
    found = None not in pool.lookup(keys, 10.0)
    return sum(node.asked for node in nodes) - before, found


def test_after_a_node_joined_blocks_are_found_at_former_owners_by_few_questions(
    nodes: list[CountingNode], unions: list[UnionPool]
) -> None:
    writer, reader = unions
    prefixes = [prefix(name) for name in range(PREFIXES)]
    for keys in prefixes:
        store(writer, keys)
    reader.add_node(nodes[NODES], 1e9)
    first = [asked_by(nodes, reader, prefix(("absent", at)))[0] for at in range(WATCH_LOOKUPS)]
    assert min(first) > NODES, "all are asked for some lookups after a change"
    asked = [asked_by(nodes, reader, keys) for keys in prefixes]
    assert all(found for _, found in asked), "whatever lies with a former owner is found"
    owned = [count for count, _ in asked if count <= 3]
    assert PREFIXES * 0.5 < len(owned) < PREFIXES, "most lie where they are looked for, some do not"


def test_a_prompt_that_is_new_asks_few_nodes_once_the_first_lookups_after_a_change_are_over(
    nodes: list[CountingNode], unions: list[UnionPool]
) -> None:
    reader = unions[1]
    reader.add_node(nodes[NODES], 1e9)
    asked = [asked_by(nodes, reader, prefix(at))[0] for at in range(5 * WATCH_LOOKUPS)]
    later = sorted(asked[WATCH_LOOKUPS:])
    assert later[len(later) // 2] <= 8, "owners and those before them"
    assert sum(count > NODES for count in later) == 4, "one of 64 asks all"


def test_what_a_stand_in_took_while_the_owner_was_down_is_found_by_few_questions(
    nodes: list[CountingNode], unions: list[UnionPool]
) -> None:
    writer, reader = unions
    keys = prefix("a")
    store(writer, keys)
    owner = next(node for node in nodes if keys[0] in node.held)
    owner.held.clear()
    owner.up = False
    store(writer, keys)
    owner.up = True
    assert not owner.held and any(keys[0] in node.held for node in nodes)
    while asked_by(nodes, reader, prefix("absent"))[0] >= NODES:
        """The first lookups ask all, as everywhere."""
    count, found = asked_by(nodes, reader, keys)
    assert found and count < NODES + 8, "the next block is asked for at few nodes, what follows a find at all"
