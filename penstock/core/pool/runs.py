"""Runs: consecutive blocks of a prefix that lie on one node of a large pool, and how a lookup finds them.

The first block of a run names its node (`core.pool.placement`). Some blocks always begin a run, as their key says, one
in RUN_BLOCKS; so does a block whose parent is not the end of a run that this writer goes on with. So continuations of
one prefix lie on different nodes from their first own block on, however many prompts share what is before it; and a
reader knows where a run may begin: at such a key, and at the first block that the run before does not have.

RUN-1   Statement: A block lies where its run does: with the node of the first block of the run.
RUN-2   Statement: A lookup asks no node twice for one block, and ends after ROUNDS_MAX rounds.
RUN-3   Statement: Every block up to the first hole is found, where the nodes that their runs name have them, no run
        has more than ROUNDS_MAX - 1 others between its first block and the next one whose key begins a run.
Verification: tests/core/pool/test_runs.py.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from penstock.core.keys import KEY_BYTES, BlockKey

RUN_BLOCKS = 64  # on average: as many as a span has at most
FIRST_PARTS = 4  # runs that the first round asks for, at least: a prompt that nobody wrote costs no more messages
ROUNDS_MAX = 6
OPEN_RUNS_MAX = 65_536
_MARKS = bytes(byte % RUN_BLOCKS == 0 for byte in range(256))  # of the byte that says whether a block begins a run

Hit = TypeVar("Hit")
NodeOf = Callable[[BlockKey], int | None]


def begins_run(key: BlockKey) -> bool:
    """Whether this block begins a run, whatever is before it."""
    return bool(_MARKS[key[8]])


class OpenRuns:
    """The runs that a writer goes on with, by their last block; those of the prefixes written to last. Not
    thread-safe."""

    def __init__(self, capacity: int = OPEN_RUNS_MAX) -> None:
        self._capacity = capacity
        self._nodes: OrderedDict[BlockKey, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._nodes)

    def place(self, key: BlockKey, parent: BlockKey, owner: NodeOf, usable: Callable[[int], bool]) -> int | None:
        """The node of a block that is written now; None when there is none. `owner`: the node of a run that begins with
        a block. A run whose node is not `usable` any more ends."""
        node = self._nodes.pop(parent, None)
        if node is None or begins_run(key) or not usable(node):
            node = owner(key)
        if node is not None:
            self._nodes[key] = node
            if len(self._nodes) > self._capacity:
                self._nodes.popitem(last=False)
        return node


@dataclass(slots=True)
class _Part:
    """Blocks from one whose key begins a run to the next such; `at`: the first that was not found yet. Every node in
    `asked` was asked for all from there on."""

    at: int
    end: int
    asked: set[int] = field(default_factory=set)


class RunSearch(Generic[Hit]):
    """One lookup of the consecutive blocks `keys`, in rounds; not thread-safe. `nodes` has the nodes to ask for a block
    that may begin a run, best first: its owner, and where it was seen. `seen`: whether a block was found or written not
    long ago; runs that begin with such blocks are asked for in the first round. A hit is not false."""

    def __init__(
        self,
        keys: Sequence[BlockKey],
        nodes: Callable[[BlockKey], Sequence[int]],
        seen: Callable[[BlockKey], bool] = lambda _: False,
    ) -> None:
        self._keys = keys
        self._nodes, self._seen = nodes, seen
        self.found: list[Hit | None] = [None] * len(keys)
        begins = list(_begins(keys))
        self._parts = [_Part(at, end) for at, end in zip([0, *begins], [*begins, len(keys)], strict=True)]
        self._rounds = 0
        self._live = len(self._parts)  # parts from this one on are of no use: a block before them lies nowhere

    @property
    def end(self) -> int:
        """The first block that was not found; as many as there are keys when all were."""
        return next((part.at for part in self._parts if part.at < part.end), len(self._keys))

    def next_round(self) -> dict[int, list[range]]:
        """The blocks to ask each node for now, by index; empty when the lookup has ended."""
        if self._rounds == ROUNDS_MAX:
            return {}
        asks: dict[int, list[range]] = {}
        for number in range(self._live if self._rounds else self._first_parts()):
            part = self._parts[number]
            if part.at == part.end:
                continue
            node = next((node for node in self._nodes(self._keys[part.at]) if node not in part.asked), None)
            if node is None:
                self._live = number
                break
            part.asked.add(node)
            asks.setdefault(node, []).append(range(part.at, part.end))
        self._rounds += 1
        return asks

    def _first_parts(self) -> int:
        """The parts that the first round asks for."""
        number = min(FIRST_PARTS, self._live)
        while number < self._live and self._seen(self._keys[self._parts[number].at]):
            number += 1
        return number

    def note(self, asked: Sequence[range], hits: Sequence[Hit | None]) -> None:
        """Take the answer of one node: a hit or None for each block that it was asked for. A hit that was found before
        stays. Raises ValueError for another number of them."""
        if len(hits) != sum(map(len, asked)):
            raise ValueError(f"{len(hits)} answers for {sum(map(len, asked))} blocks")
        found, taken = self.found, 0
        for some in asked:
            new = hits[taken : taken + len(some)]
            taken += len(some)
            if any(found[some.start : some.stop]):
                new = [one or other for one, other in zip(found[some.start : some.stop], new, strict=True)]
            found[some.start : some.stop] = new

    def advance(self) -> None:
        """All answers of a round, or what was known before the first one, are noted."""
        found = self.found
        for part in self._parts:
            if all(found[part.at : part.end]):  # most are: then no block costs a step of Python
                part.at = part.end
            else:
                part.at = next(at for at in range(part.at, part.end) if found[at] is None)


def _begins(keys: Sequence[BlockKey]) -> Iterator[int]:
    """The blocks after the first one that begin a run, as `begins_run`."""
    marks = b"".join(keys)[8::KEY_BYTES].translate(_MARKS)
    at = marks.find(1, 1)
    while at > 0:
        yield at
        at = marks.find(1, at + 1)
