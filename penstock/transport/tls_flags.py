"""The flags of mutual TLS between Penstock's processes, the same in every command that has such connections.

The API's own TLS, which its clients see, is another matter and has other flags.
"""

from __future__ import annotations

from typing import Annotated

from penstock.command_line import flag

_GROUP = "TLS between Penstock's processes"

PeerTlsCert = Annotated[
    str | None,
    flag(_GROUP, "none", "This process's certificate, which names its addresses; PEM, with its chain.", "FILE"),
]
PeerTlsKey = Annotated[str | None, flag(_GROUP, "none", "The certificate's key; readable by its owner alone.", "FILE")]
PeerTlsCa = Annotated[str | None, flag(_GROUP, "none", "The CA that has signed all peers' certificates.", "FILE")]
