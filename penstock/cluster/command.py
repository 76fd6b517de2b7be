"""`penstock router`: one OpenAI-compatible endpoint in front of many engines, until a signal ends it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from penstock.command_line import flag, log_to_stderr, refuse
from penstock.server.api_flags import (
    LIMITS,
    AllowedHost,
    ApiKey,
    ApiKeyFile,
    ApiKeys,
    ConfigFile,
    CorsOrigin,
    DrainTimeout,
    HideCachedTokens,
    Host,
    KeepAlive,
    LogLevel,
    OpenMetrics,
    Port,
    RequestTimeout,
    RequireTenant,
    Revision,
    ServedModelName,
    TlsCert,
    TlsKey,
)
from penstock.transport.tls_flags import PeerTlsCa, PeerTlsCert, PeerTlsKey

if TYPE_CHECKING:
    from penstock.cluster.flags import RouterFlags

CLOSE_TIMEOUT_S = 5.0
FAILED = 1
_CLUSTER = "Cluster"


class RouterEnded(RuntimeError):
    """The router has failed inside and serves no more."""


def router(
    model: Annotated[
        str | None,
        typer.Argument(help="Checkpoint folder or hub id, for its tokenizer; without it clients send token ids."),
    ] = None,
    host: Host = None,
    port: Port = None,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    api_keys: ApiKeys = None,
    require_tenant: RequireTenant = None,
    hide_cached_tokens: HideCachedTokens = None,
    open_metrics: OpenMetrics = None,
    allowed_host: AllowedHost = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    cors_origin: CorsOrigin = None,
    served_model_name: ServedModelName = None,
    revision: Revision = None,
    cluster_listen: Annotated[
        str | None, flag(_CLUSTER, "127.0.0.1:7100", "Where engines register (their --router).", "HOST:PORT")
    ] = None,
    secret_file: Annotated[
        str | None, flag(_CLUSTER, "none", "File with the cluster's secret; required without certificates.", "FILE")
    ] = None,
    peer_tls_cert: PeerTlsCert = None,
    peer_tls_key: PeerTlsKey = None,
    peer_tls_ca: PeerTlsCa = None,
    read: Annotated[
        str | None,
        flag(
            _CLUSTER,
            "split",
            "Which side reads a request's KV from the pool: split (both, each a share), shorter (the one with the "
            "shorter queue), alternate, or prefill.",
        ),
    ] = None,
    placement: Annotated[
        str | None,
        flag(_CLUSTER, "balanced", "How engines are chosen: balanced (by what is unfinished on each), or turns."),
    ] = None,
    recompute: Annotated[
        bool | None,
        flag(
            _CLUSTER,
            "off",
            "Let prefill engines that would wait for a load compute the front of a hit while the rest is read.",
            names=("--recompute",),
        ),
    ] = None,
    lease_s: Annotated[
        float | None,
        flag(_CLUSTER, "3", "An engine not heard of for so long is fenced: its requests are placed again."),
    ] = None,
    grace_s: Annotated[
        float | None, flag(_CLUSTER, "2", "After a start, wait so long for engines that have a request's answer begun.")
    ] = None,
    no_engine_s: Annotated[
        float | None, flag(LIMITS, "30", "A request that no engine can serve for so long ends with a 503.")
    ] = None,
    keep_alive_s: KeepAlive = None,
    request_timeout_s: RequestTimeout = None,
    drain_timeout_s: DrainTimeout = None,
    log_level: LogLevel = None,
    config: ConfigFile = None,
) -> None:
    """Serve the OpenAI-compatible API with the engines that register."""
    given = {name: value for name, value in locals().items() if name != "config" and value != []}
    from penstock.cluster.flags import read_router_flags
    from penstock.core.config import ConfigError

    try:
        flags = read_router_flags(given, config)
    except ConfigError as error:
        refuse("penstock router", error)
    log_to_stderr(flags.log_level.upper())
    try:
        _serve(flags)
    except RouterEnded as error:
        refuse("penstock router", error, FAILED)
    except (ValueError, OSError) as error:
        refuse("penstock router", error)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _serve(flags: RouterFlags) -> None:
    """Raises ValueError, OSError or RouterEnded with one line."""
    from penstock.cluster.flags import proof_of, router_settings, server_settings
    from penstock.cluster.live_view import ui_routes
    from penstock.cluster.router import ClusterEngine
    from penstock.file_limit import raise_file_limit
    from penstock.server.app import ServerApp
    from penstock.server.run import HttpServer, bind, url_of, warn_of_open_port
    from penstock.server.text import TextCodec, load_text_codec
    from penstock.units import format_address, parse_address

    settings, server_side = router_settings(flags), server_settings(flags)
    raise_file_limit()
    secret, tls = proof_of(flags)
    codec: TextCodec | None = None
    with bind(flags.host, flags.port) as listener, bind(*parse_address(flags.cluster_listen)) as cluster:
        url = url_of(listener, server_side.tls is not None)
        warn_of_open_port(server_side, listener, url)
        if flags.model:
            from penstock.engine.checkpoint import quiet_transformers, resolve_folder

            with quiet_transformers():
                codec = load_text_codec(resolve_folder(flags.model, "dummy", flags.revision))
            if codec is not None:
                codec.start()
                settings = replace(settings, vocabulary=codec.vocabulary_digest)
        cluster.listen()
        engine = ClusterEngine(cluster, secret, settings, tls)
        try:
            app = ServerApp(engine, codec, server_side, ui_routes(engine, server_side.model_name))
            place = format_address(*cluster.getsockname()[:2])
            ready = f"penstock: router {server_side.model_name} listening on {url}, engines on {place}"
            server = HttpServer(app, listener, lambda: print(ready, flush=True))
            engine.on_failed = server.stop
            server.serve_forever()
            if engine.failure is not None:  # whoever started this process starts it again
                raise RouterEnded(engine.failure)
        finally:
            if codec is not None:
                codec.close()
            engine.close(CLOSE_TIMEOUT_S)
