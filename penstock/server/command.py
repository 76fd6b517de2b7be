"""`penstock serve`: a model behind the OpenAI-compatible API, until a signal ends it."""

from __future__ import annotations

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
    from penstock.server.flags import ServeFlags
    from penstock.server.text import TextCodec

DEFAULT_PORT = 8000
_MODEL, _POOL, _ORDER, _CLUSTER = "Model", "KV cache", "Scheduling", "Cluster"


def serve(
    model: Annotated[
        str | None, typer.Argument(help="A Hugging Face checkpoint folder or hub id (none: --executor modelled).")
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
    load_format: Annotated[str | None, flag(_MODEL, "auto", "auto, or dummy for random weights.")] = None,
    dtype: Annotated[str | None, flag(_MODEL, "auto", "Type of weights and KV, for example bfloat16.")] = None,
    device: Annotated[str | None, flag(_MODEL, "auto", "cpu, cuda, cuda:1, ...")] = None,
    seed: Annotated[int | None, flag(_MODEL, "0", "Seed of random weights.")] = None,
    executor: Annotated[
        str | None, flag(_MODEL, "real", "real, or modelled: real bytes, compute that takes a profile's time.")
    ] = None,
    profile: Annotated[
        str | None, flag(_MODEL, "h100-llama-3.1-8b", "Profile of the modelled executor: a name or a .toml file.")
    ] = None,
    bytes_divisor: Annotated[int | None, flag(_MODEL, "1", "Modelled executor: KV bytes divided by this.")] = None,
    time_factor: Annotated[float | None, flag(_MODEL, "1", "Modelled executor: times multiplied by this.")] = None,
    pool: Annotated[list[str] | None, flag(_POOL, "none", "A pool node; may be repeated.", "HOST:PORT")] = None,
    memory: Annotated[
        list[str] | None, flag(_POOL, "1GiB if alone", "A memory member of this process; may be repeated.", "SIZE")
    ] = None,
    slab: Annotated[
        list[str] | None, flag(_POOL, "none", "A slab member of this process; may be repeated.", "PATH:SIZE")
    ] = None,
    pool_config: Annotated[
        str | None, flag(_POOL, "none", "TOML file that describes the pool, as of penstock pool.", "FILE")
    ] = None,
    no_pool: Annotated[bool | None, flag(_POOL, "off", "Serve without a pool.", names=("--no-pool",))] = None,
    pool_key_file: Annotated[
        str | None,
        flag(_POOL, "none", "File (0600) with the key without which nobody writes what this engine reads.", "FILE"),
    ] = None,
    kv_memory: Annotated[str | None, flag(_POOL, "512MiB", "Device memory for KV (L1).", "SIZE")] = None,
    staging: Annotated[str | None, flag(_POOL, "128MiB", "Host staging memory (L2).", "SIZE")] = None,
    block_tokens: Annotated[int | None, flag(_POOL, "64", "Tokens of one block.")] = None,
    policy: Annotated[
        str | None, flag(_ORDER, "feasible", "fcfs, sjf-compute, sjf, srpt, edf, lstf or feasible.")
    ] = None,
    mode: Annotated[
        str | None, flag(_ORDER, "penstock", "penstock, or coupled: the baseline that loads, then computes.")
    ] = None,
    max_context: Annotated[int | None, flag(_ORDER, "the model's", "Tokens of prompt and answer together.")] = None,
    max_batch_tokens: Annotated[int | None, flag(_ORDER, "2048", "Tokens computed in one batch.")] = None,
    max_batch_s: Annotated[
        float | None, flag(_ORDER, "none; prefill engines 0.3", "Predicted seconds of one batch.")
    ] = None,
    recompute: Annotated[
        bool | None,
        flag(_ORDER, "off", "Compute the front of a hit while the rest loads, where sooner.", names=("--recompute",)),
    ] = None,
    max_running: Annotated[int | None, flag(_ORDER, "64", "Requests loading or computing at once.")] = None,
    max_waiting: Annotated[int | None, flag(_ORDER, "1024", "Requests waiting; further ones get a 429.")] = None,
    fetch_window_blocks: Annotated[int | None, flag(_ORDER, "8", "Blocks in flight per link.")] = None,
    age_bound_s: Annotated[float | None, flag(LIMITS, "60", "Who waited longer goes first.")] = None,
    age_delays: Annotated[
        float | None,
        flag(LIMITS, "0.75", "A request goes first once its delay is this many times that of arrival order; 0: off."),
    ] = None,
    default_slo_ttft_s: Annotated[
        float | None, flag(LIMITS, "10", "Deadline of the first token for requests that name none.")
    ] = None,
    fetch_timeout_s: Annotated[float | None, flag(LIMITS, "10", "A slower load is computed instead.")] = None,
    lookup_timeout_s: Annotated[float | None, flag(LIMITS, "2", "A slower lookup counts as a miss.")] = None,
    keep_alive_s: KeepAlive = None,
    request_timeout_s: RequestTimeout = None,
    drain_timeout_s: DrainTimeout = None,
    router: Annotated[
        str | None, flag(_CLUSTER, "none", "Serve for this router (its --cluster-listen), without an API.", "HOST:PORT")
    ] = None,
    role: Annotated[
        str | None,
        flag(_CLUSTER, "mixed", "With --router: prefill (prompts), decode (what follows) or mixed (whole requests)."),
    ] = None,
    secret_file: Annotated[
        str | None, flag(_CLUSTER, "none", "File with the secret of pool nodes, router and relays.", "FILE")
    ] = None,
    peer_tls_cert: PeerTlsCert = None,
    peer_tls_key: PeerTlsKey = None,
    peer_tls_ca: PeerTlsCa = None,
    engine_name: Annotated[str | None, flag(_CLUSTER, "NODE-ROLE-PID", "Name in the cluster.")] = None,
    node: Annotated[
        str | None, flag(_CLUSTER, "host name", "Machine in the cluster: its engines share a storage NIC.")
    ] = None,
    relay_listen: Annotated[
        str | None,
        flag(_CLUSTER, "127.0.0.1:0", "Decode: where prefill engines hand over to (compute network).", "HOST:PORT"),
    ] = None,
    relay_pace: Annotated[
        str | None, flag(_CLUSTER, "none", "Decode: send blocks to prefill engines no faster than this.", "RATE")
    ] = None,
    relay_transport: Annotated[
        str | None,
        flag(_CLUSTER, "tcp", "How blocks move between prefill and decode engines: tcp, shared-memory or nixl."),
    ] = None,
    buffer: Annotated[str | None, flag(_CLUSTER, "1GiB", "Decode: memory in which prompts gather.", "SIZE")] = None,
    hand_off_timeout_s: Annotated[
        float | None,
        flag(_CLUSTER, "600", "Decode: a request whose prompt is not handed over by then is placed again."),
    ] = None,
    log_level: LogLevel = None,
    config: ConfigFile = None,
) -> None:
    """Serve a model with the OpenAI-compatible API; its KV cache comes from the pool."""
    given = {name: value for name, value in locals().items() if name != "config" and value != []}
    from penstock.core.config import ConfigError
    from penstock.server.flags import read_flags

    try:
        flags = read_flags(given, config)
    except ConfigError as error:
        refuse("penstock serve", error)
    log_to_stderr(flags.log_level.upper())
    try:
        _serve(flags)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _serve(flags: ServeFlags) -> None:
    """Everything cheap is checked before the model is loaded; the port is reserved first and opened last."""
    from penstock.core.config import ConfigError
    from penstock.pool.api import PoolError
    from penstock.server.app import ServerApp
    from penstock.server.flags import engine_config, server_settings
    from penstock.server.run import BindError, HttpServer, bind, url_of, warn_of_open_port

    if flags.router is not None:
        from penstock.cluster.engine_process import serve_for_router

        try:
            serve_for_router(flags)
        except (ValueError, OSError, PoolError) as error:
            refuse("penstock serve", error)
        return
    try:
        if flags.role != "mixed":
            raise ConfigError(f"role is {flags.role!r} without a router; allowed: mixed")
        config, settings = engine_config(flags), server_settings(flags)
        listener = bind(flags.host, DEFAULT_PORT if flags.port is None else flags.port)
    except (ConfigError, BindError) as error:
        refuse("penstock serve", error)
    url = url_of(listener, settings.tls is not None)
    warn_of_open_port(settings, listener, url)
    with listener:
        try:
            from penstock.engine.build import build_engine
            from penstock.engine.pauses import settle

            codec = _codec(flags)
            if codec is not None:
                codec.start()
            running = build_engine(config)
            settle()
        except (ValueError, OSError, PoolError) as error:
            refuse("penstock serve", error)
        app = ServerApp(running.engine, codec, settings)
        ready = f"penstock: {settings.model_name} listening on {url}"
        try:
            HttpServer(app, listener, lambda: print(ready, flush=True)).serve_forever()
        except BindError as error:
            refuse("penstock serve", error)
        finally:
            if codec is not None:
                codec.close()
            running.close()


def _codec(flags: ServeFlags) -> TextCodec | None:
    """The checkpoint's tokenizer. Raises CheckpointError or TokenizerError."""
    if not flags.model:
        return None
    from penstock.engine.checkpoint import quiet_transformers, resolve_folder
    from penstock.server.text import load_text_codec

    with quiet_transformers():
        return load_text_codec(
            resolve_folder(flags.model, "dummy" if flags.load_format == "dummy" else "auto", flags.revision)
        )
