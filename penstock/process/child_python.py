"""Starts Python processes that import installed modules only, never modules of the working directory.

CHILD-1  Statement: No module is imported from the working directory. Fault: `python -m` and `python -c` search the
         working directory first, so that a file `xxhash.py` beside the configuration was executed.
Verification: tests/process/test_child_python.py.
"""

from __future__ import annotations

import os
import sys


def python_command(*arguments: str, interpreter: str = "") -> list[str]:
    """A command of an interpreter, by default of this one; `arguments` begin with a script, `-m` or `-c`."""
    return [interpreter or sys.executable, "-P", *arguments]


def child_environment() -> dict[str, str]:
    """This process's environment, changed so that grandchildren are started the same way. An empty entry of PYTHONPATH
    (as made by `PYTHONPATH=$PYTHONPATH:/x`) means the working directory, and is removed."""
    found = dict(os.environ)
    paths = [one for one in found.pop("PYTHONPATH", "").split(os.pathsep) if one]
    if paths:
        found["PYTHONPATH"] = os.pathsep.join(paths)
    found["PYTHONSAFEPATH"] = "1"
    return found
