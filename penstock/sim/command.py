"""`penstock sim`: one sub-command per module of `commands`."""

from __future__ import annotations

from penstock.lazy_commands import LazyCommand, lazy_group

sim = lazy_group(
    {
        "run": LazyCommand(
            "penstock.sim.commands.run:run",
            "Simulates what a file describes: latencies, SLO attainment, goodput, link use over time, balance.",
        ),
        "plan": LazyCommand(
            "penstock.sim.commands.plan:plan",
            "How many prefill and decode nodes, which P/D ratio and which storage NICs meet an SLO.",
        ),
        "validate": LazyCommand(
            "penstock.sim.commands.validate:validate",
            "Simulates recorded live runs from their own profile; prints the error of the predicted TTFT by request.",
        ),
        "fuzz": LazyCommand(
            "penstock.sim.commands.fuzz:fuzz",
            "Runs random engines, clusters, requests and faults against the core.",
        ),
        "cost": LazyCommand(
            "penstock.sim.commands.cost:cost",
            "Processor time of one decision with 1,000 and 10,000 waiting requests.",
        ),
    },
    name="sim",
    add_completion=False,
    help="The real scheduler core on a virtual clock: your cluster from a file (begin with "
    "`run deploy/sim-engine.toml`), plans, randomised faults. docs/reference/simulator.md says what is modelled.",
)
