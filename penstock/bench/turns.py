"""Several running systems, one of them active at a time: each replays the same slice of a workload in its turn. So the
same request reaches all of them within seconds, and drift of the machine affects all alike."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from penstock.bench.system_under_test import Bed, Run, System, SystemUnderTest
from penstock.workloads.deadlines import RequestName
from penstock.workloads.generators import Workload
from penstock.workloads.progress import Counter, Progress
from penstock.workloads.replay import RequestRecord

SLICE_REQUESTS = 2  # small slices hardly queue; queueing multiplies the machine's noise
PAUSE_S = 0.1  # between two systems, so that the first one's saves have ended


def slices(workload: Workload, requests: int = SLICE_REQUESTS) -> list[Workload]:
    """The sessions in order of their starts, whole, in groups of at least this many requests each (a smaller last group
    is merged into the one before); each group begins at 0."""
    groups: list[list[int]] = [[]]
    counts = [0]
    order = sorted(range(len(workload.sessions)), key=lambda i: workload.sessions[i].start_s)
    for i in order:
        if counts[-1] >= requests:
            groups.append([])
            counts.append(0)
        groups[-1].append(i)
        counts[-1] += len(workload.sessions[i].turns)
    if len(groups) > 1 and counts[-1] < requests:
        last = groups.pop()
        groups[-1] += last
    found = []
    for group in groups:
        sessions = [workload.sessions[i] for i in group]
        first_s = sessions[0].start_s
        found.append(replace(workload, sessions=tuple(replace(s, start_s=s.start_s - first_s) for s in sessions)))
    return found


@dataclass(frozen=True, slots=True)
class Turns:
    """What each system did over all slices; `groups` names the slice of each session."""

    runs: list[Run]
    groups: Mapping[str, int]


def run_in_turns(
    bed: Bed,
    systems: Sequence[System],
    workload: Workload,
    deadlines: Mapping[RequestName, float],
    slice_s_max: float,
    progress: Progress,
) -> Turns:
    """Replay a workload slice by slice, each on every system. Their order changes from slice to slice, so that each
    runs equally often before each other. Raises SystemFailed."""
    parts = slices(workload)
    orders = itertools.cycle(itertools.permutations(systems))
    counter = Counter(progress, f"in turns: {workload.name}", workload.requests * len(systems))
    records: dict[System, list[RequestRecord]] = {system: [] for system in systems}
    wall_s: dict[System, float] = dict.fromkeys(systems, 0.0)
    with ExitStack() as stack:
        served = {system: stack.enter_context(SystemUnderTest(bed, system)) for system in systems}
        for one in served.values():
            one.warm_up(workload.context_tokens_max)
        for part, order in zip(parts, orders, strict=False):
            for system in order:
                time.sleep(PAUSE_S)
                run = served[system].replay(part, deadlines, slice_s_max, counter)
                records[system] += run.records
                wall_s[system] += run.wall_s
    groups = {session.name: number for number, part in enumerate(parts) for session in part.sessions}
    return Turns([Run(system, records[system], wall_s[system]) for system in systems], groups)
