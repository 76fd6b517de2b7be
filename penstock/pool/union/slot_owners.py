"""Which children of a large union own runs of blocks: the map of slots over its nodes, and the local pool's share."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from penstock.core.keys import BlockKey
from penstock.core.pool.placement import STRIPED_NODES_MAX, SlotMap, agreed_weight, slot_of
from penstock.pool.union.child import Child
from penstock.units import parse_address

log = logging.getLogger(__name__)

STAND_INS = 3  # that a block is offered to when its owner refuses it
FORMER_MAPS = 4  # that are remembered
FORMER_NODES = 2  # of each map that may have a run: its owner, and the first stand-in
_SHARE_SCALE = 1 << 32


@dataclass(frozen=True, slots=True)
class _Owners:
    """A map, the children whose numbers are in it, and below which part of a key's range the local pool owns it."""

    map: SlotMap
    children: Sequence[Child]
    local_below: int

    def is_local(self, key: BlockKey) -> bool:
        return int.from_bytes(key[4:8], "little") < self.local_below


class SlotOwners:
    """Numbers of children by key; its truth value is whether the union has many nodes. `refresh` is for one thread at a
    time, all else for any: what it computes is replaced as a whole, and stays when nodes become few.

    A local pool is not in the map, since no other engine knows it: it takes its share of the runs first, by their keys,
    and the map that all engines agree on places the rest.
    """

    def __init__(self) -> None:
        self._named: list[tuple[int, str, float]] = []
        self._states: list[bool] = []
        self._owners: _Owners | None = None
        self._former: tuple[SlotMap, ...] = ()  # the latest first
        self._many = False

    def __bool__(self) -> bool:
        return self._many

    def refresh(self, children: Sequence[Child]) -> bool:
        """Take up nodes that were added, dropped or weighted anew; returns whether any did, or came up or went down."""
        states, many = [child.up for child in children], self._many
        changed, self._states = states != self._states, states
        named = [(at, child.name, _weight(child)) for at, child in enumerate(children) if _is_node(child)]
        if len(named) <= STRIPED_NODES_MAX or not any(weight for _, _, weight in named):
            self._many = False
            return changed or many
        found = self._owners.map if self._owners is not None else None
        if found is None or named != self._named:
            self._former = (*((found,) if found is not None else ()), *self._former)[:FORMER_MAPS]
            found, self._named, changed = SlotMap(named), named, True
            log.info("blocks are placed by slots over %d pool nodes, map %s", found.nodes, found.version)
        local = next((_weight(child) for child in children if child.local is not None), 0.0)
        total = local + sum(weight for _, _, weight in named)
        self._owners = _Owners(found, children, int(_SHARE_SCALE * local / total))
        self._many = True
        return changed or not many

    def shares(self, children: Sequence[Child]) -> tuple[float, ...]:
        """Each child's share of new blocks."""
        owners = self._known
        local = owners.local_below / _SHARE_SCALE
        return tuple(
            local if child.local is not None else (1 - local) * owners.map.share(at)
            for at, child in enumerate(children)
        )

    def owner(self, key: BlockKey) -> int | None:
        """The child that a run which begins with this block goes to: its owner, or the first stand-in that is up; None
        when all are down."""
        owners = self._known
        number = 0 if owners.local_below and owners.is_local(key) else owners.map.owner(slot_of(key))
        return number if owners.children[number].up else next(self._order(key), None)

    def order(self, key: BlockKey) -> list[int]:
        """The children that are up: the owner of the run that this block begins, then a few stand-ins."""
        return list(islice(self._order(key), 1 + STAND_INS))

    def copy_nodes(self, key: BlockKey) -> list[int]:
        """The nodes that hold the blocks of a run which begins with this one, where they have copies, of those that are
        up: the owner, and the first node for its slot on another host, as hosts fail as a whole; on the owner's where
        there is no other one."""
        owners = self._known
        owner, *others = owners.map.order(slot_of(key))
        host = _host(owners.children[owner])
        up = [at for at in others if owners.children[at].up]
        second = next((at for at in up if _host(owners.children[at]) != host), next(iter(up), None))
        return [at for at in (owner, second) if at is not None and owners.children[at].up]

    def owner_is_down(self, key: BlockKey) -> bool:
        """Whether others stand in for the owner of the run that this block begins."""
        owners = self._known
        return not owners.children[owners.map.owner(slot_of(key))].up

    def former(self, keys: Collection[BlockKey]) -> list[int]:
        """The nodes that are up and may have a run which begins with one of these blocks, beside its owner: those that
        former maps name, and the first stand-in of this one."""
        children = self._known.children
        nodes = dict.fromkeys(
            number
            for key in keys
            for slots in (self._known.map, *self._former)
            for number in islice(slots.order(slot_of(key)), FORMER_NODES)
            if children[number].up
        )
        owners = {self.owner(key) for key in keys}
        return [number for number in nodes if number not in owners]

    def _order(self, key: BlockKey) -> Iterator[int]:
        owners = self._known
        if owners.is_local(key):
            yield 0
        for number in owners.map.order(slot_of(key)):
            if owners.children[number].up:
                yield number

    @property
    def _known(self) -> _Owners:
        assert self._owners is not None, "asked before the union had many nodes"
        return self._owners


def _host(child: Child) -> str:
    return parse_address(child.name)[0]


def _is_node(child: Child) -> bool:
    return child.node is not None and not child.left


def _weight(child: Child) -> float:
    """A weight that all engines agree on: the one that was configured, else what the node says of its members."""
    if child.configured is not None:
        return child.configured
    pool = child.node if child.node is not None else child.as_local
    return agreed_weight(pool.read_bytes_per_s)
