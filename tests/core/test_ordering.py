"""The orderings: each policy's order, the example of CALVO's section 1, and the queue they live in."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.config import POLICIES, Policy
from penstock.core.engine.feasibility import Job, tardy_jobs
from penstock.core.ordering import Rank, RankedQueue, policy_key
from penstock.engine.profile import load_profile

# name: arrival, deadline, load, compute; no two policies agree on the first
JOBS = {
    "early": (0.0, 9.0, 3.0, 0.5),
    "tiny compute": (1.0, 12.0, 4.0, 0.1),
    "short": (2.0, 11.0, 0.5, 0.6),
    "urgent": (3.0, 5.0, 1.0, 0.3),
    "little slack": (4.0, 8.5, 5.0, 1.0),
}


@pytest.mark.parametrize(
    ("policy", "order"),
    [
        ("fcfs", ["early", "tiny compute", "short", "urgent", "little slack"]),
        ("sjf-compute", ["tiny compute", "urgent", "early", "short", "little slack"]),
        ("sjf", ["short", "urgent", "early", "tiny compute", "little slack"]),
        ("srpt", ["short", "urgent", "early", "tiny compute", "little slack"]),
        ("edf", ["urgent", "little slack", "early", "short", "tiny compute"]),
        ("lstf", ["little slack", "urgent", "early", "tiny compute", "short"]),
        ("feasible", ["little slack", "urgent", "early", "tiny compute", "short"]),
    ],
)
def test_the_order_of_each_policy(policy: Policy, order: list[str]) -> None:
    assert policy in POLICIES
    assert sorted(JOBS, key=lambda name: policy_key(policy, *JOBS[name])) == order


def mean_ttft(order: list[tuple[float, float]]) -> float:
    ends = list(itertools.accumulate(load + compute for load, compute in order))
    return sum(ends) / len(ends)


@pytest.mark.parametrize(("policy", "mean"), [("fcfs", 0.49), ("sjf-compute", 0.49), ("sjf", 0.41)])
def test_the_example_of_calvo(policy: Policy, mean: float) -> None:
    """R1 loads 0.361 s and computes 0.019 s, R2 0.199 s and 0.025 s; both are there, served one after the other."""
    requests = [(0.361, 0.019), (0.199, 0.025)]
    order = sorted(range(2), key=lambda i: (policy_key(policy, float(i), 10.0, requests[i][0], requests[i][1]), i))
    assert round(mean_ttft([requests[i] for i in order]), 2) == mean


def test_the_shipped_profile_computes_that_example() -> None:
    compute = load_profile("h100-llama-3.1-8b").compute_cost()
    assert compute.seconds([(28, 28_100)]) == pytest.approx(0.019, rel=0.02)
    assert compute.seconds([(134, 15_500)]) == pytest.approx(0.025, rel=0.02)


@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 60)), min_size=1, max_size=7),
    st.integers(0, 5),
    st.integers(0, 2),
)
def test_no_other_choice_meets_more_deadlines_on_one_stage(jobs: list[tuple[int, int]], now: int, stage: int) -> None:
    def stages(seconds: int) -> tuple[float, float, float]:
        return (float(seconds) if stage == 0 else 0.0, float(seconds) if stage == 1 else 0.0, seconds * (stage == 2))

    def on_time(chosen: tuple[int, ...]) -> bool:
        done = now
        for index in sorted(chosen, key=lambda i: jobs[i][1]):
            done += jobs[index][0]
            if done > jobs[index][1]:
                return False
        return True

    late = tardy_jobs([Job(float(deadline), stages(seconds)) for seconds, deadline in jobs], float(now))
    everyone = range(len(jobs))
    assert on_time(tuple(i for i in everyone if i not in late))
    best = max(size for size in range(len(jobs) + 1) if any(map(on_time, itertools.combinations(everyone, size))))
    assert len(jobs) - len(late) == best


@dataclass(eq=False)
class Member:
    rank: Rank


def test_a_ranked_queue_against_sorting() -> None:
    chance = random.Random(0)
    members = [Member((1, 0.0, i)) for i in range(40)]
    queue: RankedQueue[Member] = RankedQueue()
    inside: set[int] = set()
    for _ in range(4000):
        i = chance.randrange(40)
        if chance.random() < 0.7:
            members[i].rank = (chance.randrange(3), float(chance.randrange(5)), i)
            queue.push(members[i])
            inside.add(i)
        else:
            queue.discard(members[i])
            inside.discard(i)
        expected = sorted((members[j] for j in inside), key=lambda member: member.rank)
        assert len(queue) == len(expected) and set(queue) == set(expected)
        assert queue.peek() is (expected[0] if expected else None)
        count = chance.randrange(6)
        assert queue.first(count) == expected[:count]
        assert (members[i] in queue) == (i in inside)
