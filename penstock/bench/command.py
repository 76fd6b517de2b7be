"""`penstock bench`: one sub-command per experiment; each experiment lives in a module of its own."""

from __future__ import annotations

import typer

from penstock.bench.experiments.calvo import calvo
from penstock.bench.experiments.demo import demo
from penstock.bench.experiments.dualpath import dualpath
from penstock.bench.experiments.gpu import gpu
from penstock.bench.experiments.io import io
from penstock.bench.experiments.pool import pool
from penstock.bench.experiments.serve import serve
from penstock.bench.experiments.transport import transport
from penstock.bench.experiments.vllm import vllm

bench = typer.Typer(help="Measure Penstock against its limits on this machine.", no_args_is_help=True)
bench.command()(calvo)
bench.command()(dualpath)
bench.command()(gpu)
bench.command()(io)
bench.command()(pool)
bench.command()(transport)
bench.command()(vllm)
bench.command()(demo)
bench.command()(serve)
