"""`penstock serve`: serves a model with the OpenAI-compatible API, until a signal ends it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

from penstock.cluster.engine.serve_flags import ServeFlags, engine_config, read_flags, server_settings
from penstock.command_line import ConfigFile, log_to_stderr, refuse, with_flags
from penstock.core.config import ConfigError
from penstock.pool.net.tls_flags import TLS_NAMES, TLS_PANEL
from penstock.server.api_flags import API, API_FLAGS, API_LIMITS, CLUSTER, LIMITS
from penstock.server.api_settings import DEFAULT_PORT

if TYPE_CHECKING:
    from penstock.server.text import TextCodec

PANELS = {
    API: API_FLAGS,
    "Model": ("load_format", "dtype", "device", "seed", "executor", "profile", "bytes_divisor", "time_factor"),
    "KV cache": (
        *("pool", "memory", "slab", "pool_config", "no_pool", "pool_key_file", "kv_memory", "staging"),
        "fetch_window",
        "gpu_direct",
        "block_tokens",
        "kv_events",
        "kv_events_replay",
    ),
    "Scheduling": (
        *("policy", "mode", "max_context", "max_batch_tokens", "max_batch_s", "recompute", "max_running"),
        "max_waiting",
    ),
    LIMITS: (
        *("age_bound_s", "age_delays", "default_slo_ttft_s", "fetch_timeout_s", "lookup_timeout_s"),
        *API_LIMITS,
    ),
    CLUSTER: (
        *("router", "role", "secret_file", "engine_name", "node", "relay_listen", "relay_pace", "relay_transport"),
        *("buffer", "hand_off_timeout_s"),
    ),
    TLS_PANEL: TLS_NAMES,
    "": ("log_level",),
}


@with_flags(ServeFlags, PANELS)
def serve(given: Mapping[str, Any], config: ConfigFile = None) -> None:
    """Serve a model with the OpenAI-compatible API; its KV cache comes from the pool."""
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
    """Cheap checks are done before the model is loaded; the port is reserved first and opened last."""
    from penstock.pool.api import PoolError
    from penstock.server.app import ServerApp
    from penstock.server.run import BindError, HttpServer, bind, url_of, warn_of_open_port

    if flags.router is not None:
        from penstock.cluster.engine.engine_process import serve_for_router

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
            from penstock.process.startup_objects import freeze_startup_objects

            codec = _codec(flags)
            if codec is not None:
                codec.start()
            running = build_engine(config)
            freeze_startup_objects()
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
    """The checkpoint's tokenizer. Raises CheckpointError, ExtraMissing or TokenizerError."""
    if not flags.model:
        return None
    from penstock.engine.checkpoint_folder import quiet_transformers, resolve_folder
    from penstock.extras import require_extra
    from penstock.process.without_torch import leave_out_torch
    from penstock.server.text import load_text_codec

    if flags.executor == "real":  # said at once, not after the tokenizer's
        require_extra("engine", f"serving {flags.model}")
    else:
        leave_out_torch()
    with quiet_transformers():
        return load_text_codec(
            resolve_folder(flags.model, "dummy" if flags.load_format == "dummy" else "auto", flags.revision)
        )
