"""How a router asks an engine over HTTP to register with it: `POST PATH` at the engine's own pages.

A prefill engine beside which many routers come and go (one beside each decode engine, as llm-d's routing sidecars) is
not told of them when it starts; a request that names the engine does. The proof says that the asking router has the
cluster's secret, without which anybody could have an engine dial any address; what follows is an ordinary
registration, in which both sides prove themselves.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from penstock.cluster.wire_types import Name
from penstock.pool.net.secret import Secret

PATH = "/penstock/routers"
PROOF_HEADER = "x-penstock-proof"
BODY_BYTES_MAX = 4096
_PURPOSE = b"ask to register"


class AskedRegistration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Register at `host`:`port` under this name. An empty `host` is the address from which this came."""

    name: Name
    host: Name
    port: Annotated[int, Meta(ge=1, le=65535)]


def proof_of_asking(secret: Secret, body: bytes) -> str:
    """What PROOF_HEADER has to be."""
    return secret.proof("client", _PURPOSE, b"", body).hex()
