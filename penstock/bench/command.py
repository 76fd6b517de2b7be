"""`penstock bench`: one sub-command per experiment; each experiment lives in a module of its own."""

from __future__ import annotations

import typer

from benchmarks.calvo.live import calvo
from benchmarks.demo.demo import demo
from benchmarks.dualpath.live import dualpath
from benchmarks.peers.vllm import vllm
from benchmarks.pooling.live import pool
from penstock.bench.gpu import gpu
from penstock.bench.io import io
from penstock.bench.serve import serve
from penstock.bench.transport import transport

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
