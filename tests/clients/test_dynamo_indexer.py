"""Dynamo's KV indexer learns from `penstock serve` what its pool holds: live, by replay, and what was evicted."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys

import pytest

from tests.children import CHECKOUT
from tests.clients.client_rig import PYTHON, run

NEEDED = [name for name in ("unshare", "ip") if shutil.which(name) is None]
IN_OWN_NETWORK = ["unshare", "--net", "--fork", "--kill-child", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]


@pytest.mark.skipif(importlib.util.find_spec("dynamo") is None, reason="ai-dynamo-runtime has no wheel here")
@pytest.mark.skipif(bool(NEEDED), reason=f"there is no {' and no '.join(NEEDED)} here")
@pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace needs root")
def test_the_indexer_knows_what_the_pool_holds() -> None:
    code = f"import sys; sys.path.insert(0, {str(CHECKOUT)!r}); from tests.clients.indexer_round import main; main()"
    said = run([*IN_OWN_NETWORK, "env", f"PENSTOCK_PYTHON={PYTHON}", sys.executable, "-P", "-c", code])
    learned = json.loads(said.splitlines()[-1])
    assert learned == {"live": 80, "replayed": 80, "unknown": 0, "known": 256, "held": 256, "dropped": 0}
