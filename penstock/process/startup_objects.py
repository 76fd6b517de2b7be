"""Python's garbage collector, kept from stopping a process that serves."""

from __future__ import annotations

import gc


def freeze_startup_objects() -> None:
    """To be called when all that lives as long as the process is there: modules, model, engine. A full collection
    looks at all of it (0.1 s with torch and transformers), and nothing is served meanwhile; from now on it looks at
    newer objects only."""
    gc.collect()
    gc.freeze()
