"""Which children of a large union own runs of blocks: the map of slots over its nodes, and the local pool's share."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from penstock.core.keys import BlockKey
from penstock.core.pool.placement import STRIPED_NODES_MAX, SlotMap, agreed_weight, slot_of
from penstock.pool.union.child import Child

log = logging.getLogger(__name__)

_SHARE_SCALE = 1 << 32


class SlotOwners:
    """Numbers of children by key; nothing while the union has few nodes. `refresh` is for one thread at a time, all
    else for any: the map is replaced as a whole.

    A local pool is not in the map, since no other engine knows it: it takes its share of the runs first, by their keys,
    and the map that all engines agree on places the rest.
    """

    def __init__(self) -> None:
        self._named: list[tuple[int, str, float]] = []
        self._states: list[bool] = []
        self._map: SlotMap | None = None
        self._local_below = 0

    def __bool__(self) -> bool:
        return self._map is not None

    def refresh(self, children: Sequence[Child]) -> bool:
        """Take up nodes that were added, dropped or weighted anew; returns whether any did, or came up or went down."""
        nodes = [(at, child) for at, child in enumerate(children) if child.node is not None and not child.left]
        states = [child.up for child in children]
        changed, self._states = states != self._states, states
        if len(nodes) <= STRIPED_NODES_MAX:
            changed |= self._map is not None
            self._map, self._named = None, []
            return changed
        named = [(at, child.name, _weight(child)) for at, child in nodes]
        if named != self._named and any(weight for _, _, weight in named):
            found = SlotMap(named)
            log.info("blocks are placed by slots over %d pool nodes, map %s", found.nodes, found.version)
            self._map, self._named, changed = found, named, True
        local = next((_weight(child) for child in children if child.local is not None), 0.0)
        total = local + sum(weight for _, _, weight in self._named)
        self._local_below = int(_SHARE_SCALE * local / total) if total else 0
        return changed

    def shares(self, children: Sequence[Child]) -> tuple[float, ...]:
        """Each child's share of new blocks."""
        assert self._map is not None
        local = self._local_below / _SHARE_SCALE
        return tuple(
            local if child.local is not None else (1 - local) * self._map.share(at) for at, child in enumerate(children)
        )

    def owner(self, key: BlockKey, children: Sequence[Child]) -> int | None:
        """The child that a run which begins with this block goes to: its owner, or the first stand-in that is up; None
        when all are down."""
        assert self._map is not None
        if self._local_below and self._is_local(key):
            return 0
        number = self._map.owner(slot_of(key))
        if children[number].up:
            return number
        return next((number for number in self._map.order(slot_of(key)) if children[number].up), None)

    def order(self, key: BlockKey, children: Sequence[Child]) -> list[int]:
        """The children that are up: the owner of the run that this block begins, then its stand-ins."""
        assert self._map is not None
        order = [number for number in self._map.order(slot_of(key)) if children[number].up]
        if children[0].local is not None:
            order.insert(0 if self._is_local(key) else len(order), 0)
        return order

    def _is_local(self, key: BlockKey) -> bool:
        return int.from_bytes(key[4:8], "little") < self._local_below


def _weight(child: Child) -> float:
    """A weight that all engines agree on: the one that was configured, else what the node says of its members."""
    if child.configured is not None:
        return child.configured
    pool = child.node if child.node is not None else child.as_local
    return agreed_weight(pool.read_bytes_per_s)
