"""Links of nodes and decode engines that come and go: what is known of them is bounded."""

from __future__ import annotations

from penstock.core.bandwidth import LinkCost
from penstock.core.cost import LEARNED_LINKS_MAX, ComputeCost, CostModel
from penstock.core.engine.fetching import LINK_FORGET_S, LINKS_IDLE_MAX
from tests.core.scheduler_rig import BLOCK, Bench, prompt_of, spec


def test_the_links_of_decode_engines_that_started_again_are_forgotten() -> None:
    """Each has an address of its own, and so links of its own."""
    count = LINKS_IDLE_MAX + 200
    bench = Bench(links={f"relay@d:{number}": 1e9 for number in range(count)})
    links = bench.scheduler.cost.links
    links.clear()  # nothing was given: all is learned
    for number in range(count):
        prompt = prompt_of(number, BLOCK + 10)
        bench.stored(prompt, 1, (f"relay@d:{number}",))
        bench.driver.submit_at(float(number), spec(f"r{number}", prompt, 1))
    bench.driver.run()
    assert len(bench.driver.ended) == count
    assert len(relays(bench)) <= LINKS_IDLE_MAX + 1
    assert len(links) <= LINKS_IDLE_MAX + 1 and f"relay@d:{count - 1}" in links
    late = prompt_of(count, BLOCK + 10)
    bench.stored(late, 1, ("relay@d:0",))
    bench.driver.submit_at(count + LINK_FORGET_S + 1.0, spec("late", late, 1))
    bench.driver.run()
    assert relays(bench) == {"relay@d:0"} == set(links)


def relays(bench: Bench) -> set[str]:
    """Links to decode engines that the metrics show."""
    return {name for name in bench.scheduler.links() if name.startswith("relay@")}


def test_what_was_given_is_not_forgotten() -> None:
    cost = CostModel(LinkCost(1e9), ComputeCost(1e-3, 1e-4, 0.0), {"net": LinkCost(5e9)})
    for number in range(LEARNED_LINKS_MAX + 50):
        cost.link(f"relay@d:{number}")
    cost.forget("net")
    assert len(cost.links) == LEARNED_LINKS_MAX + 1
    assert cost.link("net").bytes_per_s == 5e9
