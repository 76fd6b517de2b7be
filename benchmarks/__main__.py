"""`python -m benchmarks NAME`, in a checkout: one command and module per experiment."""

from __future__ import annotations

from penstock.lazy_commands import LazyCommand, lazy_group

app = lazy_group(
    {
        "demo": LazyCommand(
            "benchmarks.demo.demo:demo",
            "Replays multi-turn agent sessions over HTTP, coupled and with Penstock; writes table, page and picture.",
        ),
        "calvo": LazyCommand(
            "benchmarks.calvo.live:calvo",
            "CALVO's set-up live over TCP with real bytes and modelled compute.",
        ),
        "pool": LazyCommand(
            "benchmarks.pooling.live:pool",
            "Pooled reads, TTFT and CPU against their bounds and the baselines.",
        ),
        "dualpath": LazyCommand(
            "benchmarks.dualpath.live:dualpath",
            "Prefill read, DualPath and split reads on hosts with storage and compute NICs: job times, rates, TPOT.",
        ),
        "vllm": LazyCommand(
            "benchmarks.peers.vllm:vllm",
            "Serves the same requests with four systems over links of the same rate: TTFT, SLO attainment.",
        ),
        "sim-tables": LazyCommand(
            "benchmarks.tables:tables",
            "All three papers on their own hardware; limits are the papers' figures, or bounds.",
        ),
        "sim-calvo": LazyCommand(
            "benchmarks.calvo.simulated:calvo_command",
            "CALVO on its own hardware: TTFT and SLO attainment of every ordering.",
        ),
        "sim-pool": LazyCommand(
            "benchmarks.pooling.simulated:pool",
            "Unified KV Pooling on its own hardware: 2 memories and 2 SSDs as one pool, 16K to 128K of context.",
        ),
        "sim-dualpath": LazyCommand(
            "benchmarks.dualpath.simulated:dualpath",
            "DualPath on its own hardware: job times, ablation, P/D ratios, online capacity, scale.",
        ),
        "event-loops": LazyCommand(
            "benchmarks.event_loops:event_loops",
            "Threads that wait in the kernel, as in the pool's client, beside asyncio and uvloop.",
        ),
        "draw": LazyCommand(
            "benchmarks.draw:draw",
            "Draws the picture of a run from the figures that it wrote.",
        ),
    },
    name="python -m benchmarks",
    help="The papers' experiments, live and simulated, and Penstock beside other systems; docs/measurements/README.md.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
