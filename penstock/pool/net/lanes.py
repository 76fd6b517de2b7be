"""Two lanes of traffic: urgent (hand-off to decode engines, tokens, control) and bulk (KV between pool and engines).

They have connections of their own everywhere. What tells them apart to the network: the DSCP of their packets, for
switches, and the socket's priority, for the queueing of this host (`prio` and `mqprio` put 6 before 2 by default).
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
    """Put a TCP socket on a lane, for what it sends. A system that knows no such marks sends without them."""
    traffic_class = (URGENT_DSCP if urgent else BULK_DSCP) << 2
    with contextlib.suppress(OSError):
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, traffic_class)
        else:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, traffic_class)
        # After the class: that sets a priority of its own.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, URGENT_PRIORITY if urgent else BULK_PRIORITY)
