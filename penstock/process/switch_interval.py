"""Sets how long a thread may hold Python's interpreter lock while another one waits for it."""

from __future__ import annotations

import sys

SWITCH_INTERVAL_S = 5e-4


def switch_often() -> None:
    """Shorten the switch interval, so that a thread that computes or renders delays the threads that serve clients
    less."""
    sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_INTERVAL_S))
