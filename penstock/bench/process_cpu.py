"""The CPU time of processes so far, in nanoseconds' resolution, as the kernel keeps it for each."""

from __future__ import annotations

import time

_SCHEDULED = 2  # CPUCLOCK_SCHED of Linux: the time that a process was on a processor


def cpu_s(*pids: int) -> float:
    """CPU seconds of these processes so far, with their threads, those that ended too, without their children. Raises
    OSError where one is not there any more."""
    return sum(time.clock_gettime(~pid << 3 | _SCHEDULED) for pid in pids)
