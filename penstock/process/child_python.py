"""How Python processes are started: with modules that are installed, never those of the folder one happens to be in.

`python -m` and `python -c` put the working directory before everything else, so that a file `xxhash.py` beside the
configuration would be executed. Verification: tests/process/test_child_python.py.
"""

from __future__ import annotations

import os
import sys


def python_command(*arguments: str) -> list[str]:
    """A command of this interpreter; `arguments` begin with a script, `-m` or `-c`."""
    return [sys.executable, "-P", *arguments]


def child_environment() -> dict[str, str]:
    """This process's environment, in which the children's own children are started so too. An empty entry of PYTHONPATH
    (as `PYTHONPATH=$PYTHONPATH:/x` makes) names the working directory, and is left out."""
    found = dict(os.environ)
    paths = [one for one in found.pop("PYTHONPATH", "").split(os.pathsep) if one]
    if paths:
        found["PYTHONPATH"] = os.pathsep.join(paths)
    found["PYTHONSAFEPATH"] = "1"
    return found
