"""The product's HTTP server over an engine that answers with the prompt's own tokens; run by the product's interpreter.

    python -m tests.clients.echo_server HOLD_AFTER MAX_OPEN PORT

Requests stop at HOLD_AFTER tokens until their client leaves; MAX_OPEN are taken, and more get a 429.
"""

from __future__ import annotations

import signal
import sys

from penstock.server.app import ServerApp
from penstock.server.run import HttpServer, bind, url_of
from penstock.server.settings import ServerSettings
from penstock.server.text import TextCodec
from penstock.testing.tiny_models import TINY_VOCABULARY, build_tokenizer
from tests.server.echo_engine import EchoEngine

STEP_S = 0.005  # so that tokens come in chunks of their own


def main(hold_after: int, max_open: int, port: int) -> None:
    codec = TextCodec(build_tokenizer(TINY_VOCABULARY))
    app = ServerApp(
        EchoEngine(hold_after=hold_after, max_open=max_open, step_s=STEP_S),
        codec,
        ServerSettings("echo", drain_timeout_s=1.0),
    )
    listener = bind("127.0.0.1", port)
    server = HttpServer(app, listener, lambda: print(f"listening on {url_of(listener)}", flush=True))
    signal.signal(signal.SIGTERM, lambda *_: server.stop())
    server.serve_forever()
    codec.close()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
