"""One seed is one history, bit for bit: twice in a process, and in processes with other seeds of Python's hashes."""

from __future__ import annotations

import random
import subprocess
import sys

from tests.children import with_tests
from tests.sim.sim_rig import LINK, SimBench

PROGRAM = "from tests.sim.test_sim_history import digest; print(digest(5))"


def digest(seed: int) -> str:
    """Hash of the log of a run with shared prefixes, failures, cancels, a slow link and preemptions."""
    rng = random.Random(seed)
    bench = SimBench(
        {LINK: 1e9, "ssd": 3e8}, policy="feasible", l1_pages=60, l2_slots=20, max_running=6,
        driver={"save_route": (LINK,), "fetch_fault": lambda key: "checksum" if rng.random() < 0.05 else None},
    )  # fmt: skip
    for i in range(25):
        at_s = rng.uniform(0, 0.2)
        prompt = bench.submit(
            at_s, f"r{i}", rng.randrange(12), rng.randint(1, 250), family=i % 6, new_tokens=rng.randint(1, 8),
            deadline_s=at_s + rng.uniform(0.01, 0.5),
        )  # fmt: skip
        bench.stored(prompt, rng.randrange(6), ("ssd", LINK))
    bench.driver.cancel_at(0.1, "r3")
    bench.clock.at(0.05, lambda: bench.links.set_speed(LINK, 1e8))
    bench.clock.at(0.15, lambda: bench.links.set_speed(LINK, 1e9))
    bench.driver.run()
    assert len(bench.driver.ended) == 25 and bench.scheduler.idle
    return bench.log.digest


def test_one_seed_is_one_history() -> None:
    assert digest(5) == digest(5)
    assert digest(5) != digest(6)


def test_a_history_does_not_depend_on_the_seed_of_hashes() -> None:
    found = set()
    for seed in ("0", "1", "4711"):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=with_tests(PYTHONHASHSEED=seed),
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        found.add(done.stdout.strip())
    assert found == {digest(5)}
