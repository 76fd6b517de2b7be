"""A fork of this process: in an emulated virtual machine a new Python takes seconds to import what this one has."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable


def forked(act: Callable[[], str]) -> tuple[int, str]:
    """How a child that calls `act` ended (a signal as a negative number), and what that returned or raised there."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(reader)
            os.write(writer, act().encode())
        except BaseException:  # noqa: BLE001 (of the child, which ends without anything of pytest's)
            os.write(writer, traceback.format_exc().encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as said:
        text = said.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text
