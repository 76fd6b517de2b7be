"""A front process of `penstock router --fronts N`: HTTP, templates, tokenizer, streams. The placer's process starts it.

Its standard input has a `FrontStart`; what it inherits are the listening socket, which all fronts share, and its ends
of two socket pairs with the placer. It ends when the placer does, or on SIGTERM in order.
"""

from __future__ import annotations

import logging
import socket
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from penstock.cluster.router.fronts.start import FrontStart, read_start, share_of

if TYPE_CHECKING:
    from penstock.cluster.router.fronts.engine import FrontEngine

log = logging.getLogger("penstock.cluster.router.fronts.process")  # this module is __main__

CLOSE_TIMEOUT_S = 5.0
LINKED_S = 3.0  # before it serves clients it waits so long for connections to all engines
LOOK_S = 0.02


def main() -> int:
    """Serve until the placer or a signal ends it; returns the exit status."""
    start = read_start(sys.stdin.buffer.read())
    from penstock.command_line import log_to_stderr, one_line

    log_to_stderr(start.flags.log_level.upper(), f"front {start.slot}")
    try:
        failure = _serve(start)
    except (ValueError, OSError) as error:
        failure = one_line(error)
    except KeyboardInterrupt:
        return 130
    if failure is not None:
        log.error("it ends: %s", failure)
    return int(failure is not None)


def _serve(start: FrontStart) -> str | None:
    """Returns the internal error that ended it. Raises ValueError or OSError with one line."""
    from penstock.cluster.peer_proof import proof_of
    from penstock.cluster.router.fronts.balance import FrontBalance
    from penstock.cluster.router.fronts.engine import FrontEngine, FrontSockets
    from penstock.cluster.router.fronts.pages import FrontPages
    from penstock.cluster.router.router_flags import router_codec, router_settings, server_settings
    from penstock.cluster.router.vllm_api import VllmApi
    from penstock.process.file_limit import raise_file_limit
    from penstock.process.startup_objects import freeze_startup_objects
    from penstock.process.without_torch import leave_out_torch
    from penstock.server.app import ServerApp
    from penstock.server.run import HttpServer

    flags = start.flags
    raise_file_limit()
    settings, server_side = router_settings(flags), share_of(server_settings(flags), start.fronts)
    secret, tls = proof_of(flags)
    leave_out_torch()
    codec = router_codec(flags)
    if codec is not None:
        codec.start()
        settings = replace(settings, vocabulary=codec.vocabulary_digest)
    sockets = FrontSockets(socket.socket(fileno=start.channel), socket.socket(fileno=start.links), start.prefixes)
    with socket.socket(fileno=start.listener) as listener:
        engine = FrontEngine(sockets, start.prefix_secret, secret, settings, tls)
        try:
            pages = FrontPages(engine)
            app = ServerApp(engine, codec, server_side, pages.routes, VllmApi(engine, server_side))
            pages.serve(app)
            balance = FrontBalance(start.balance, start.slot, start.fronts)
            server = HttpServer(app, listener, engine.say_ready, balance)
            engine.on_failed = server.stop
            _await_links(engine)
            freeze_startup_objects()
            server.serve_forever()
            return engine.failure
        finally:
            if codec is not None:
                codec.close()
            engine.close(CLOSE_TIMEOUT_S)


def _await_links(engine: FrontEngine) -> None:
    """Wait for the connections of engines that are there already, so that the first requests need not."""
    end_s = time.monotonic() + LINKED_S
    time.sleep(LOOK_S)  # the placer says first which engines there are
    while time.monotonic() < end_s and not engine.all_linked():
        time.sleep(LOOK_S)


if __name__ == "__main__":
    sys.exit(main())
