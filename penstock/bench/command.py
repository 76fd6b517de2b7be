"""`penstock bench`: measurements on an operator's own machines; one sub-command per module."""

from __future__ import annotations

import typer

from penstock.bench.gpu import gpu
from penstock.bench.io import io
from penstock.bench.pool import pool
from penstock.bench.serve import serve
from penstock.bench.transport import transport

bench = typer.Typer(
    help="Measure this machine and Penstock on it. The papers' experiments: `python -m benchmarks` in a checkout.",
    no_args_is_help=True,
)
bench.command()(gpu)
bench.command()(io)
bench.command()(pool)
bench.command()(serve)
bench.command()(transport)
