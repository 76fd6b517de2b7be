"""The next version of vLLM: its Python over this one's compiled parts, where `make test-vllm-next` has put it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
OVERLAY = Path(os.environ.get("PENSTOCK_VLLM_OVERLAY", sys.prefix + "/vllm-next"))
TIMEOUT_S = 1500
PARTS = (
    "test_vllm_hooks.py",
    "test_vllm_doctor.py",
    "test_vllm_weights.py::test_after_a_reset_nothing_of_the_weights_before_is_loaded[True-reset_all]",
    "test_vllm_order.py",
)

pytestmark = [
    pytest.mark.skipif(not (OVERLAY / "vllm").is_dir(), reason=f"no Python of a newer vLLM in {OVERLAY}"),
    pytest.mark.skipif("PENSTOCK_VLLM_NEXT" in os.environ, reason="this is the run with the newer vLLM"),
    pytest.mark.timeout(TIMEOUT_S + 60),
]


def run_over(*arguments: str) -> str:
    path = os.pathsep.join([str(OVERLAY), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": path, "PENSTOCK_VLLM_NEXT": "1"},
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def test_the_overlay_is_a_tested_version_and_not_this_one() -> None:
    import vllm

    from penstock.vllm.compat import TESTED_VERSIONS

    program = "import vllm; from penstock.vllm.compat import check_version; print(vllm.__version__, check_version())"
    version, note = run_over("-c", program).split()[-2:]
    assert version != vllm.__version__ and version.startswith(TESTED_VERSIONS) and note == "None"


@pytest.mark.parametrize("part", PARTS)
def test_penstock_works_in_it(part: str) -> None:
    run_over("-m", "pytest", "-q", "-p", "no:cacheprovider", part)
