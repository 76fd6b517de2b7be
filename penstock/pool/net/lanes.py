"""Two lanes of traffic: urgent (hand-off to decode engines, tokens, control) and bulk (KV between pool and engines).

The two lanes never share a connection. The network distinguishes them by the DSCP of their packets (switches), and this
host's queueing discipline by the socket priority (`prio` and `mqprio` send 6 before 2 by default).
"""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from penstock.pool.net.tls_socket import Stream

URGENT_DSCP = 46  # expedited forwarding
BULK_DSCP = 8  # class selector 1: below best effort
URGENT_PRIORITY = 6  # the highest that needs no privilege
BULK_PRIORITY = 2


def mark(sock: Stream, urgent: bool) -> None:
    """Mark the packets that a TCP socket sends as one lane. A system without such marks sends without them."""
    traffic_class = (URGENT_DSCP if urgent else BULK_DSCP) << 2
    with contextlib.suppress(OSError):
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, traffic_class)
        else:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, traffic_class)
        # After the traffic class, which sets a priority too.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, URGENT_PRIORITY if urgent else BULK_PRIORITY)
