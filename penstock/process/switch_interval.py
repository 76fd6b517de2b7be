"""How long a thread may hold Python's interpreter while another one waits for it."""

from __future__ import annotations

import sys

SWITCH_INTERVAL_S = 5e-4


def switch_often() -> None:
    """In a process whose threads serve others: one that computes, or renders, holds the rest up no longer."""
    sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_INTERVAL_S))
