"""Connects to pool nodes by address: to one, or to several that form one pool, with or without a local pool."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

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


def connect_node(
    address: str, connect_timeout_s: float = 5.0, secret: Secret | None = None, tls: PeerTls | None = None
) -> RemotePool | UnionPool:
    """The pool node at "HOST:PORT"; with all its processes, where it has several. Raises as `connect_pool`."""
    first = connect_pool(address, 1, connect_timeout_s, secret, tls)
    if not first.siblings:
        return first
    return UnionPool(None, [first], open_node=_opener(1, connect_timeout_s, b"", False, secret, tls))


def _opener(
    connections: int,
    connect_timeout_s: float,
    node_id: bytes,
    own_only: bool,
    secret: Secret | None,
    tls: PeerTls | None,
) -> Callable[[str], RemotePool]:
    """How a union opens a node, which may be down."""

    def open_node(address: str) -> RemotePool:
        host, port = parse_address(address)
        return RemotePool(host, port, connections, connect_timeout_s, False, node_id, own_only, secret, tls)

    return open_node


def add_node(
    union: UnionPool,
    address: str,
    weight: float | None,
    connect_timeout_s: float = 5.0,
    secret: Secret | None = None,
    tls: PeerTls | None = None,
) -> None:
    """Add a node to a union that is served by a pool node. A node that is down is used once it is up.

    Raises ValueError for a malformed address, or one that is already in the union."""
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
    """The local pool, if there is one, and the nodes at these addresses as one pool, which owns the local pool. A node
    that is down causes a warning only, as long as another child is up. `for_node`: a pool node serves the union.

    If an engine has one node, the union includes that node's members on other nodes. With several nodes it does not, as
    they may be members of each other. A node answers other nodes only from its own members.

    Further processes of a node, which it names itself, are added as nodes, and share its weight.

    `weights` are bytes per second, the local pool's first if there is one; None: measured. `follow_bandwidth`: a node's
    share falls when its reads become slower. Raises ValueError for a malformed or repeated address,
    PoolError("network") when no child is up.
    """
    node_id = os.urandom(NODE_ID_BYTES) if for_node else b""
    open_node = _opener(connections, connect_timeout_s, node_id, len(addresses) > 1, secret, tls)
    nodes: list[RemotePool] = []
    try:
        for address in addresses:
            nodes.append(open_node(address))
    except BaseException:
        for node in nodes:
            node.close(1.0)
        if local is not None:
            local.close(1.0)
        raise
    return UnionPool(local, nodes, weights, node_id, follow_bandwidth, open_node)
