"""Which requests to defer so that most of the others meet their deadlines (policy `feasible`).

Moore and Hodgson's rule for the most on-time jobs on one machine, with the stages of a load as machines that work at
the same time: in order of deadlines, whenever one would be late, the job that takes most of the busiest stage is
deferred.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

STAGES = 3


@dataclass(frozen=True, slots=True)
class Job:
    """What remains of one request: seconds on each stage (fetch, upload, compute), and its deadline."""

    deadline_s: float
    stage_s: tuple[float, float, float]


def tardy_jobs(jobs: Sequence[Job], now: float) -> set[int]:
    """Indices of the jobs that should come after all others. O(n log n) while few are late."""
    busy = [0.0] * STAGES
    accepted: set[int] = set()
    late: set[int] = set()
    for index in sorted(range(len(jobs)), key=lambda i: jobs[i].deadline_s):
        job = jobs[index]
        accepted.add(index)
        for stage in range(STAGES):
            busy[stage] += job.stage_s[stage]
        bottleneck = busy.index(max(busy))
        if now + busy[bottleneck] + _tail(job, bottleneck) <= job.deadline_s:
            continue
        victim = max(accepted, key=lambda i: jobs[i].stage_s[bottleneck])
        accepted.remove(victim)
        late.add(victim)
        for stage in range(STAGES):
            busy[stage] -= jobs[victim].stage_s[stage]
    return late


def _tail(job: Job, bottleneck: int) -> float:
    """What follows on later stages after the job's last byte left the bottleneck: its own compute."""
    return job.stage_s[2] if bottleneck < 2 else 0.0
