"""`penstock router`: one OpenAI-compatible endpoint for many engines, until a signal ends it."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import typer

from penstock.cluster.router.router_flags import RouterFlags, read_router_flags
from penstock.command_line import ConfigFile, log_to_stderr, refuse, with_flags
from penstock.core.config import ConfigError
from penstock.pool.net.tls_flags import TLS_NAMES, TLS_PANEL
from penstock.server.api_flags import API, API_FLAGS, API_LIMITS, CLUSTER, LIMITS
from penstock.server.api_settings import DEFAULT_PORT

if TYPE_CHECKING:
    from penstock.cluster.router.fronts.supervisor import FrontSupervisor
    from penstock.server.settings import ServerSettings

CLOSE_TIMEOUT_S = 5.0
FAILED = 1
PANELS = {
    API: API_FLAGS,
    CLUSTER: (
        "cluster_listen",
        "fronts",
        "sidecar",
        "secret_file",
        "read",
        "placement",
        "recompute",
        "lease_s",
        "grace_s",
    ),
    TLS_PANEL: TLS_NAMES,
    LIMITS: ("no_engine_s", *API_LIMITS),
    "": ("log_level",),
}


class RouterEnded(RuntimeError):
    """The router stopped because of an internal error."""


@with_flags(RouterFlags, PANELS)
def router(given: Mapping[str, Any], config: ConfigFile = None) -> None:
    """Serve the OpenAI-compatible API with the engines that register."""
    try:
        flags = read_router_flags(given, config)
    except ConfigError as error:
        refuse("penstock router", error)
    log_to_stderr(flags.log_level.upper())
    try:
        _serve(flags) if flags.fronts == 1 else _serve_by_fronts(flags)
    except RouterEnded as error:
        refuse("penstock router", error, FAILED)
    except (ValueError, OSError) as error:
        refuse("penstock router", error)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _serve(flags: RouterFlags) -> None:
    """Raises ValueError, OSError or RouterEnded with one line."""
    from penstock.cluster.peer_proof import proof_of
    from penstock.cluster.router.live_view import ui_routes
    from penstock.cluster.router.named_prefill import NamedPrefill
    from penstock.cluster.router.router import ClusterEngine
    from penstock.cluster.router.router_flags import router_codec, router_settings, server_settings
    from penstock.cluster.router.vllm_api import VllmApi
    from penstock.process.file_limit import raise_file_limit
    from penstock.process.startup_objects import freeze_startup_objects
    from penstock.process.without_torch import leave_out_torch
    from penstock.server.app import ServerApp
    from penstock.server.run import HttpServer, bind, url_of, warn_of_open_port
    from penstock.units import format_address, parse_address

    settings, server_side = router_settings(flags), server_settings(flags)
    raise_file_limit()
    secret, tls = proof_of(flags)
    with (
        bind(flags.host, DEFAULT_PORT if flags.port is None else flags.port) as listener,
        bind(*parse_address(flags.cluster_listen)) as cluster,
    ):
        url = url_of(listener, server_side.tls is not None)
        warn_of_open_port(server_side, listener, url)
        leave_out_torch()
        codec = router_codec(flags)
        if codec is not None:
            codec.start()
            settings = replace(settings, vocabulary=codec.vocabulary_digest)
        cluster.listen()
        engine = ClusterEngine(cluster, secret, settings, tls)
        try:
            registers_at = cluster.getsockname()[:2]
            named = NamedPrefill(engine, registers_at, secret) if flags.sidecar and secret is not None else None
            api = VllmApi(engine, server_side, named)
            app = ServerApp(engine, codec, server_side, ui_routes(engine, server_side.model_name), api)
            place = format_address(*registers_at)
            ready = f"penstock: router {server_side.model_name} listening on {url}, engines on {place}"
            server = HttpServer(app, listener, lambda: print(ready, flush=True))
            engine.on_failed = server.stop
            freeze_startup_objects()
            server.serve_forever()
            if engine.failure is not None:  # the supervisor of this process restarts it
                raise RouterEnded(engine.failure)
        finally:
            if codec is not None:
                codec.close()
            engine.close(CLOSE_TIMEOUT_S)


def _serve_by_fronts(flags: RouterFlags) -> None:
    """This process places requests, and starts those that serve clients. Raises ValueError, OSError or RouterEnded with
    one line."""
    from penstock.cluster.peer_proof import proof_of
    from penstock.cluster.router.fronts.pages import placer_record
    from penstock.cluster.router.fronts.placer import Placer
    from penstock.cluster.router.fronts.supervisor import FrontsFailed, FrontSupervisor
    from penstock.cluster.router.router_flags import router_settings, server_settings, tokenizer_folder
    from penstock.process.file_limit import raise_file_limit
    from penstock.process.startup_objects import freeze_startup_objects
    from penstock.process.without_torch import leave_out_torch
    from penstock.server.run import BACKLOG, LAST_WORDS_S, bind, url_of, warn_of_open_port
    from penstock.units import format_address, parse_address

    settings, server_side = router_settings(flags), server_settings(flags)
    raise_file_limit()
    secret, tls = proof_of(flags)
    with (
        bind(flags.host, DEFAULT_PORT if flags.port is None else flags.port) as listener,
        bind(*parse_address(flags.cluster_listen)) as cluster,
    ):
        url = url_of(listener, server_side.tls is not None)
        warn_of_open_port(server_side, listener, url)
        listener.listen(BACKLOG)
        leave_out_torch()
        tokenizer_folder(flags)  # so that the fronts find it
        cluster.listen()
        placer = Placer(cluster, secret, settings, tls, fronts=flags.fronts)
        placer.record_of = partial(placer_record, placer, server_side.model_name)
        fronts = FrontSupervisor(placer, flags, listener, flags.fronts)
        placer.on_failed = fronts.stop_soon
        try:
            _pass_signals(fronts, server_side)
            fronts.start()
            place = format_address(*cluster.getsockname()[:2])
            print(f"penstock: router {server_side.model_name} listening on {url}, engines on {place}", flush=True)
            freeze_startup_objects()
            fronts.run()
            listener.close()  # new connections are refused, as the fronts do
        except FrontsFailed as error:
            raise RouterEnded(str(error)) from None
        finally:
            fronts.stop(flags.drain_timeout_s + LAST_WORDS_S + CLOSE_TIMEOUT_S)
            placer.close(CLOSE_TIMEOUT_S)
        if placer.failure is not None:  # the supervisor of this process restarts it
            raise RouterEnded(placer.failure)


def _pass_signals(fronts: FrontSupervisor, settings: ServerSettings) -> None:
    """SIGTERM and SIGINT end the router in order, a second one at once; SIGHUP has the fronts read keys and
    certificates again, where there are any."""
    asked: list[int] = []

    def end(number: int, frame: object) -> None:
        asked.append(number)
        fronts.stop_soon()
        if len(asked) > 1:
            fronts.signal(signal.SIGKILL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    if settings.tenant_keys is not None or settings.tls is not None:
        signal.signal(signal.SIGHUP, lambda number, frame: fronts.signal(number))
