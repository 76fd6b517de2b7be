"""For `preexec_fn` of a child process that must not outlive the thread that starts it."""

from __future__ import annotations

import ctypes
import signal

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """The kernel sends this process a signal when the thread that started it ends, however that happens."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, number)
