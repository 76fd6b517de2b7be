"""Lanes: what a socket's packets carry to switches, and its priority on this host."""

from __future__ import annotations

import socket

from penstock.pool.net import lanes


def marks(sock: socket.socket) -> tuple[int, int]:
    """DSCP and priority of a socket."""
    if sock.family == socket.AF_INET6:
        traffic_class = sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS)
    else:
        traffic_class = sock.getsockopt(socket.IPPROTO_IP, socket.IP_TOS)
    return traffic_class >> 2, sock.getsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY)


def test_lanes_are_told_apart_by_the_network_and_by_this_host() -> None:
    for family in (socket.AF_INET, socket.AF_INET6):
        with socket.socket(family) as sock:
            lanes.mark(sock, urgent=True)
            assert marks(sock) == (46, 6)
            lanes.mark(sock, urgent=False)
            assert marks(sock) == (8, 2)
