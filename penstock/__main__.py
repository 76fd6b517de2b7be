"""`python -m penstock`: the same as the `penstock` command."""

from __future__ import annotations

import os
import sys

import penstock

# `python -m` puts the working directory first: a file of any module's name in it would be executed. Not where Penstock
# itself was found there.
if not sys.flags.safe_path and sys.path[0] == os.getcwd() != os.path.dirname(os.path.dirname(penstock.__file__)):
    del sys.path[0]

from penstock.cli import app

app()
