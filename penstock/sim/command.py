"""`penstock sim`: one sub-command per module of `commands`."""

from __future__ import annotations

from penstock.lazy_commands import LazyCommand, lazy_group

sim = lazy_group(
    {
        "run": LazyCommand(
            "penstock.sim.commands.run:run",
            "Simulate what a file describes: latencies, SLO attainment, goodput, links over time, balance.",
        ),
        "plan": LazyCommand(
            "penstock.sim.commands.plan:plan",
            "How many prefill and decode nodes, which P/D ratio and which storage NICs keep an SLO.",
        ),
        "validate": LazyCommand(
            "penstock.sim.commands.validate:validate",
            "Simulate recorded live runs from their own profile: error of the predicted TTFT, request by request.",
        ),
        "fuzz": LazyCommand(
            "penstock.sim.commands.fuzz:fuzz",
            "Random engines, clusters, requests and faults against the core, its invariants asserted.",
        ),
        "cost": LazyCommand(
            "penstock.sim.commands.cost:cost",
            "Processor time of one decision with 1,000 and 10,000 waiting requests.",
        ),
    },
    name="sim",
    add_completion=False,
    help="The real scheduler core on a virtual clock: your cluster from a file (begin with "
    "`run deploy/sim-engine.toml`), plans, randomised faults. docs/simulator.md says what is modelled.",
)
