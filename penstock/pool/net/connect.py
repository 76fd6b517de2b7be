"""Connections to pool nodes by their address: to one, or to several with a local pool as one pool."""

from __future__ import annotations

import os
from collections.abc import Sequence

from penstock.pool.net.remote import RemotePool
from penstock.pool.net.secret import Secret
from penstock.pool.net.tls import PeerTls
from penstock.pool.net.wire import NODE_ID_BYTES
from penstock.pool.node_backend import NodeBackend
from penstock.pool.union.union_pool import UnionPool
from penstock.units import parse_address


def connect_pool(
    address: str,
    connections: int = 1,
    connect_timeout_s: float = 5.0,
    secret: Secret | None = None,
    tls: PeerTls | None = None,
) -> RemotePool:
    """The pool node at "HOST:PORT". Raises ValueError for a malformed address, PoolError("network") when nobody answers
    or the node speaks another version of the protocol."""
    host, port = parse_address(address)
    return RemotePool(host, port, connections, connect_timeout_s, secret=secret, tls=tls)


def add_node(
    union: UnionPool,
    address: str,
    weight: float | None,
    connect_timeout_s: float = 5.0,
    secret: Secret | None = None,
    tls: PeerTls | None = None,
) -> None:
    """A further node of a union that is served by a pool node. One that is down is used once it is up.

    Raises ValueError for a malformed address, or one that is in the union already."""
    host, port = parse_address(address)
    node = RemotePool(host, port, 1, connect_timeout_s, False, union.node_id, True, secret, tls)
    union.add_node(node, weight)


def open_union(
    local: NodeBackend | None,
    addresses: Sequence[str],
    weights: Sequence[float | None] | None = None,
    connections: int = 1,
    connect_timeout_s: float = 5.0,
    for_node: bool = False,
    follow_bandwidth: bool = True,
    secret: Secret | None = None,
    tls: PeerTls | None = None,
) -> UnionPool:
    """The local pool, if there is one, and the nodes at these addresses as one pool, which takes the local pool over.
    A node that is down is a warning, as long as another child is up. `for_node`: the union is what a pool node serves.

    A node's members of other nodes belong to the union only where it is the one node of an engine: several nodes may
    have each other's, and nodes answer nodes from their own.

    `weights` are bytes per second, of the local pool first if there is one; None: measured. `follow_bandwidth`: a
    node's share falls when it is read more slowly. Raises ValueError for a
    malformed or doubled address, PoolError("network") when no child is up.
    """
    node_id = os.urandom(NODE_ID_BYTES) if for_node else b""
    nodes: list[RemotePool] = []
    try:
        for address in addresses:
            host, port = parse_address(address)
            own_only = len(addresses) > 1
            nodes.append(RemotePool(host, port, connections, connect_timeout_s, False, node_id, own_only, secret, tls))
    except BaseException:
        for node in nodes:
            node.close(1.0)
        if local is not None:
            local.close(1.0)
        raise
    return UnionPool(local, nodes, weights, node_id, follow_bandwidth)
