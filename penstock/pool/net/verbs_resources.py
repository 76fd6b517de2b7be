"""Open resources of `ibverbs`: they are kept here until they are closed.

The package crashes the process when Python finds an open one in a cycle of garbage (seen with 2026.10.22: a resource
needs its parent to be freed, and the collector may have cleared that reference before).
"""

from __future__ import annotations

import atexit
import logging
from typing import Any

log = logging.getLogger(__name__)

_kept: dict[Any, None] = {}  # parents before what was made of them


def keep(resource: Any) -> Any:
    """Keep an open resource; returns it."""
    _kept[resource] = None
    return resource


def release(resource: Any) -> bool:
    """Close a resource; a failure is logged, and it stays: False. Once closed, nothing is done."""
    try:
        resource.close()
    except OSError as error:
        log.warning("verbs: %r could not be closed: %s", resource, error)
        return False
    _kept.pop(resource, None)
    return True


@atexit.register
def _release_all() -> None:
    for resource in reversed(list(_kept)):
        release(resource)
