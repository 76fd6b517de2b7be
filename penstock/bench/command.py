"""`penstock bench`: measurements on an operator's own machines; one sub-command per module."""

from __future__ import annotations

from penstock.lazy_commands import LazyCommand, lazy_group

bench = lazy_group(
    {
        "gpu": LazyCommand(
            "penstock.bench.gpu:gpu",
            "Copies, loading hidden under compute, decodes, and TTFT of 16K to 128K token hits on a GPU.",
        ),
        "io": LazyCommand(
            "penstock.bench.io:io",
            "Read bandwidth and CPU time of the uring engine against fio, a bare ring and one file per chunk.",
        ),
        "pool": LazyCommand(
            "penstock.bench.pool:pool",
            "CPU per GB against one file per chunk.",
        ),
        "scale": LazyCommand(
            "penstock.bench.scale:scale",
            "CPU time, memory and stops of the table of one pool node with a million blocks.",
        ),
        "serve": LazyCommand(
            "penstock.bench.serve:serve",
            "Replays a trace through the API with a real small model: with Penstock, coupled, and without a pool.",
        ),
        "transport": LazyCommand(
            "penstock.bench.transport:transport",
            "Read bandwidth and CPU time of a pool node over loopback TCP against a bare socket loop.",
        ),
    },
    name="bench",
    add_completion=False,
    help="Measure this machine and Penstock on it. The papers' experiments: `python -m benchmarks` in a checkout.",
)
