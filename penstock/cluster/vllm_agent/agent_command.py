"""`penstock vllm-engine`: one vLLM as an engine of a cluster."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import typer

from penstock.cluster.vllm_agent.agent_flags import AgentFlags
from penstock.command_line import ConfigFile, log_to_stderr, refuse, with_flags
from penstock.core.config import ConfigError
from penstock.pool.net.tls_flags import TLS_NAMES, TLS_PANEL
from penstock.server.api_flags import API, CLUSTER
from penstock.settings_file import read_record

FAILED = 1
PANELS = {
    CLUSTER: (
        *(
            "router",
            "sidecars",
            "role",
            "secret_file",
            "engine_name",
            "node",
            "relay_listen",
            "relay_pace",
            "relay_transport",
        ),
        *("buffer", "hand_off_timeout_s", "start_timeout_s"),
    ),
    "KV cache": ("pool", "pool_config", "pool_key_file", "staging"),
    TLS_PANEL: TLS_NAMES,
    API: ("host", "port", "api_key", "api_key_file", "tls_cert", "tls_key"),
    "": ("log_level",),
}
PASSED_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": ["--help"]}

app = typer.Typer(add_completion=False)


@app.command(context_settings=PASSED_THROUGH, options_metavar="MODEL [OPTIONS] [FLAG OF vllm serve]...")
@with_flags(AgentFlags, PANELS)
def vllm_engine(context: typer.Context, given: Mapping[str, Any], config: ConfigFile = None) -> None:
    """Serve MODEL with vLLM for a router. Any flag of `vllm serve` may follow MODEL.

    For example: penstock vllm-engine MODEL --router 10.0.0.1:7100 --role prefill --secret-file secret
    --pool 10.0.0.5:7070 --tensor-parallel-size 2
    """
    from penstock.cluster.engine.engine_process import EngineEnded
    from penstock.cluster.vllm_agent.agent import serve_vllm
    from penstock.pool.api import PoolError

    try:
        flags = read_record(given, config, AgentFlags)
    except ConfigError as error:
        refuse("penstock vllm-engine", error)
    log_to_stderr(flags.log_level.upper())
    logging.getLogger("httpx").setLevel("WARNING")  # it says every request
    try:
        serve_vllm(flags, context.args)
    except EngineEnded as error:
        refuse("penstock vllm-engine", error, FAILED)
    except (ValueError, OSError, PoolError) as error:
        refuse("penstock vllm-engine", error)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
