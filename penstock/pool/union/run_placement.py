"""Runs of blocks on the nodes of a large union: where a block is written, and which nodes a lookup asks."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain

from penstock.core.keys import BlockKey
from penstock.core.new_block import NewBlock
from penstock.core.pool.runs import OpenRuns, RunSearch, begins_run
from penstock.core.pool.strays import StrayWatch
from penstock.pool.api import Located, PoolError
from penstock.pool.union.block_copier import Move
from penstock.pool.union.children import Children
from penstock.pool.union.locations import Locations
from penstock.pool.union.mover import Mover


class RunPlacement:
    """Used while the union has many nodes: its truth value. `locations` are guarded by the children's lock."""

    def __init__(self, children: Children, locations: Locations) -> None:
        self._children, self._locations = children, locations
        self._lock = children.lock
        self._open = OpenRuns()
        self._mover = Mover(children, locations)
        self._strays = StrayWatch(time.monotonic())
        self._changes = children.changes
        self._rebuild_s: dict[int, float] = {}  # by size of a block: the least that was seen

    def __bool__(self) -> bool:
        return bool(self._children.slots)

    @property
    def moved(self) -> int:
        """Blocks that were copied to their owners."""
        return self._mover.moved

    def close(self, timeout_s: float) -> None:
        """End moves."""
        self._mover.close(timeout_s)

    def order(self, block: NewBlock) -> list[int]:
        """The children that a new block is offered to, in this order: the one its run lies on, then the stand-ins of a
        run that would begin with it. A child without room evicts: elsewhere nobody would look for the block."""
        slots = self._children.slots
        with self._lock:
            first = self._open.place(block.key, block.parent, slots.owner, lambda at: self._children.all[at].up)
        if first is None:
            return []
        return [first, *(number for number in slots.order(block.key) if number != first)]

    def as_stored(self, block: NewBlock) -> NewBlock:
        """The block as its child stores it; the lock is held. All blocks of a size are equally dear to compute again,
        so that on all nodes the last use decides: a lookup uses the beginning of a prefix at least as late as what
        follows it on other nodes, though that is dearer to compute."""
        least_s = min(block.rebuild_s, self._rebuild_s.get(block.size_bytes, block.rebuild_s))
        if len(self._rebuild_s) < 64 or block.size_bytes in self._rebuild_s:
            self._rebuild_s[block.size_bytes] = least_s
        return block if least_s == block.rebuild_s else replace(block, rebuild_s=least_s)

    def lookup(self, keys: Sequence[BlockKey], timeout_s: float) -> list[Located | None]:
        """Ask the local pool for all, and nodes for their runs, in a few rounds. Where the hits end early, other nodes
        are asked whether one has the next block nevertheless, after a change and now and then later
        (`core.pool.strays`). Raises PoolError when no child is up."""
        search = _Search(self._children, self._locations, keys, time.monotonic() + timeout_s)
        search.ask_local()
        while search.ask_owners():
            pass
        if search.end < len(keys):
            self._ask_others(search)
        search.check()
        return search.found

    def _ask_others(self, search: _Search) -> None:
        with self._lock:
            if self._changes != self._children.changes:
                self._changes = self._children.changes
                self._strays.changed(time.monotonic())
            asked = self._strays.asks(time.monotonic())
        if asked == "none":
            return
        begin = search.end
        nodes = self._children.slots.former(search.run_begins(begin)) if asked == "former" else None
        owned = [hit is not None for hit in search.found]
        if search.ask_others(begin, begin + 1, nodes):
            search.ask_others(begin, len(search.found))
            with self._lock:
                self._strays.changed(time.monotonic())
                moves = self._moves(search, begin, owned)
            if moves:
                self._mover.offer(moves)

    def _moves(self, search: _Search, begin: int, owned: Sequence[bool]) -> list[Move]:
        """The blocks from the first one that was found beside its owner on, without those that are `owned`, and where
        everybody looks for them: where a writer who goes on there would write them. The lock is held."""
        keys, children = search.keys, self._children.all
        runs, moves = OpenRuns(len(keys)), []
        for at in range(begin, search.end):
            key, hit = keys[at], search.found[at]
            assert hit is not None
            parent = keys[at - 1] if at else None
            target = runs.place(key, parent or b"", self._children.slots.owner, lambda _: True)
            source = self._locations.find(key)
            if target is None or source is None or source == target or children[source].node is None:
                continue
            if not owned[at]:
                position = int.from_bytes(keys[begin][-4:], "little") + at - begin
                moves.append(Move(key, parent, hit.size_bytes, position, source, target))
        return moves


class _Search:
    """One lookup: asks, and notes what was found where."""

    def __init__(self, children: Children, locations: Locations, keys: Sequence[BlockKey], deadline_s: float) -> None:
        self._children, self._locations, self.keys = children, locations, keys
        self._deadline_s = deadline_s
        self._runs: RunSearch[Located] = RunSearch(keys, self._nodes, lambda key: locations.find(key) is not None)
        self._failed: PoolError | None = None
        self._answered = False

    @property
    def found(self) -> list[Located | None]:
        """The hits so far."""
        return self._runs.found

    @property
    def end(self) -> int:
        """The first block that was not found."""
        return self._runs.end

    def ask_local(self) -> None:
        """Ask the local pool, if there is one, for all blocks."""
        if self._children.local is not None:
            self._ask({0: [range(len(self.keys))]})

    def ask_owners(self) -> bool:
        """Ask the nodes of the next round; returns False when there is none, or no time is left."""
        if time.monotonic() >= self._deadline_s:
            return False
        with self._children.lock:
            asks = self._runs.next_round()
        return bool(asks) and self._ask(asks)

    def run_begins(self, at: int) -> list[BlockKey]:
        """The blocks with which the run of this block may begin: itself, and the last one before whose key says so."""
        begin = at
        while begin and not begins_run(self.keys[begin]):
            begin -= 1
        return [self.keys[at], self.keys[begin]]

    def ask_others(self, begin: int, end: int, nodes: Iterable[int] | None = None) -> bool:
        """Ask these nodes (None: all) for some of the blocks, while time is left; returns whether the first one was
        found."""
        if time.monotonic() >= self._deadline_s:
            return False
        some = [range(begin, end)]
        if nodes is None:
            nodes = (at for at, child in enumerate(self._children.all) if child.node is not None and child.up)
        self._ask({at: some for at in nodes})
        return self.found[begin] is not None

    def check(self) -> None:
        """Raise PoolError when no child answered, and none is up."""
        if not self._answered and self.keys and not any(child.up for child in self._children.all):
            raise self._failed or PoolError("network", "no pool node is up")

    def _ask(self, asks: Mapping[int, list[range]]) -> bool:
        keys, locations = self.keys, self._locations
        parts = {number: (keys[one.start : one.stop] for one in some) for number, some in asks.items()}
        asked = {number: list(chain.from_iterable(some)) for number, some in parts.items()}
        answers = self._children.ask_keys(asked, max(0.0, self._deadline_s - time.monotonic()))
        with self._children.lock:
            for number, answer in answers.items():
                self._children.note_answer(self._children.all[number], answer)
                if isinstance(answer, PoolError):
                    self._failed = answer
                    continue
                self._answered = True
                self._runs.note(asks[number], locations.note_found(asked[number], answer, number))
        self._runs.advance()
        return True

    def _nodes(self, key: BlockKey) -> list[int]:
        """As `RunSearch`: where the block was seen last, and the owner of a run that begins with it; while that is
        down, who stands in for it, and the node with the copies."""
        slots = self._children.slots
        seen, owner = self._locations.find(key), slots.owner(key)
        children, nodes = self._children.all, []
        if seen is not None and seen != owner and children[seen].node is not None and children[seen].up:
            nodes.append(seen)
        if owner is not None and children[owner].node is not None:  # it is up
            nodes.append(owner)
        if self._children.take_copies and slots.owner_is_down(key):
            nodes += [number for number in slots.copy_nodes(key) if number not in nodes]
        return nodes
