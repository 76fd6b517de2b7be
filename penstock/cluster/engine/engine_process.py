"""`penstock serve --router`: an engine that serves the requests that a router places on it, until a signal ends it.

Over HTTP it offers `/health`, `/metrics` and the live page, but no API.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import socket
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.cluster.engine.build_host import HostConfig, open_host
from penstock.cluster.engine.host import EngineHost
from penstock.cluster.engine.registration import EngineRegistration, RegistrationSettings
from penstock.cluster.peer_proof import proof_of
from penstock.cluster.settings import ClusterEngineSettings, HandOffSettings
from penstock.cluster.wire import EngineCard
from penstock.core.config import ConfigError
from penstock.core.settings import taken_over
from penstock.pool.net.tls_flags import PeerSettings
from penstock.process.file_limit import raise_file_limit
from penstock.process.startup_objects import freeze_startup_objects
from penstock.server.api_settings import ApiFlags, api_settings
from penstock.server.app import ServerApp
from penstock.server.run import HttpServer, bind, url_of
from penstock.server.settings import ServerSettings
from penstock.server.text import TokenizerError, load_text_codec
from penstock.units import parse_address

if TYPE_CHECKING:
    from penstock.cluster.engine.serve_flags import ServeFlags

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 10.0
NAME_CHARACTERS_MAX = 128


class EngineEnded(ValueError):
    """This engine will not serve again: the router refuses it for good, or the engine has failed."""


def serve_for_router(flags: ServeFlags) -> None:
    """Build the engine, register it, serve. Raises ValueError, OSError or PoolError with one line."""
    assert flags.router is not None
    config, settings = host_config(flags), registration_settings(flags, flags.router)
    name, node = engine_names(flags)
    pages = page_settings(flags, name)
    listener = bind(flags.host, flags.port or 0)
    raise_file_limit()
    with listener:
        host = open_host(config)
        freeze_startup_objects()
        try:
            app = ServerApp(host.engine, None, pages)
            ready = f"penstock: engine {name} ({config.role}) listening on {url_of(listener, pages.tls is not None)}"
            server = HttpServer(app, listener, lambda: print(ready, flush=True))
            agent = EngineRegistration(host, card_of(host, config, name, node), settings, on_refused=server.stop)
            try:
                server.serve_forever()
            finally:
                agent.close(CLOSE_TIMEOUT_S)
            if agent.failure is not None:
                raise EngineEnded(agent.failure)
        finally:
            host.close(CLOSE_TIMEOUT_S)


def host_config(flags: ServeFlags) -> HostConfig:
    """The engine and its role that these flags describe. Raises ConfigError."""
    from penstock.cluster.engine.serve_flags import engine_config

    return HostConfig(engine_config(flags), **taken_over(HandOffSettings, flags))


def card_of(host: EngineHost, config: HostConfig, name: str, node: str) -> EngineCard:
    """The engine's card for its registration."""
    engine = host.engine
    return EngineCard(
        name=name,
        role=config.role,
        host=node,
        instance=secrets.token_hex(8),
        model=card_mark(engine.fingerprint),
        block_tokens=engine.config.block_tokens,
        block_bytes=engine.config.block_bytes,
        max_context_tokens=engine.max_context_tokens,
        vocab_size=engine.vocab_size,
        eos_token_ids=tuple(sorted(engine.eos_token_ids)),
        relay_address=host.relay_address,
        pid=os.getpid(),
        vocabulary=_vocabulary(host.checkpoint),
    )


def card_mark(fingerprint: bytes) -> str:
    """Distinguishes engines with different block keys, without disclosing the root of block keys."""
    return hashlib.blake2b(fingerprint, digest_size=16, person=b"engine card").hexdigest()


def _vocabulary(checkpoint: Path | None) -> str:
    """Digest of the tokenizer's vocabulary; empty without a tokenizer that can be loaded: an engine needs token ids
    only."""
    try:
        codec = load_text_codec(checkpoint) if checkpoint is not None else None
    except TokenizerError as error:
        log.warning("%s: the router's tokenizer cannot be compared with it", error)
        return ""
    return codec.vocabulary_digest if codec is not None else ""


def registration_settings(flags: PeerSettings, router: str) -> RegistrationSettings:
    """How the engine finds its router, and proves that it belongs there. Raises ConfigError."""
    secret, tls = proof_of(flags)
    try:
        return RegistrationSettings(parse_address(router), secret, tls=tls)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def engine_names(flags: ClusterEngineSettings) -> tuple[str, str]:
    """Names of the engine and of its host. Raises ConfigError."""
    node = flags.node or socket.gethostname()
    name = flags.engine_name or f"{node}-{flags.role}-{os.getpid()}"
    for what, given in (("engine_name", name), ("node", node)):
        if not given.isprintable() or len(given) > NAME_CHARACTERS_MAX:
            raise ConfigError(f"{what} is {given!r}; allowed: up to {NAME_CHARACTERS_MAX} printable characters")
    return name, node


def page_settings(flags: ApiFlags, name: str) -> ServerSettings:
    """Settings of its pages and metrics; the router handles tenants. Raises ConfigError."""
    return replace(api_settings(flags, name), model_name=name, tenant_keys=None, cors_origins=(), api=False)
