"""What copies of KV blocks reach on a GPU, with nothing installed but torch and numpy, from a checkout of Penstock:

    PYTHONPATH=. python examples/gpu_copies.py --json gpu-copies.json

Blocks of 8 MiB (Llama 3.1 8B) go up and down as Penstock's connector moves them inside vLLM, in vLLM's layouts, beside
one plain copy of as many bytes; and what that costs the host. `penstock bench gpu` measures the rest. Without a GPU
`--device cpu` shows that it runs; only the `host_` figures mean something then.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch

from penstock.bench.gpu_copies import LLAMA_COPIES, TINY_COPIES, measure_host, measure_rows


class Printed:
    """Figures, printed as they come."""

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}
        self.limits: dict[str, float] = {}

    def figure(self, name: str, value: float, limit: float | None = None) -> None:
        """Record a figure, and its goal."""
        self.figures[name] = value
        if limit is not None:
            self.limits[name] = limit
        print(f"{name:48} {value:10.4g}   goal {limit:g}" if limit is not None else f"{name:48} {value:10.4g}")


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the figures here")
    asked = parser.parse_args()
    device, printed = torch.device(asked.device), Printed()
    measure_host(LLAMA_COPIES, printed)
    measure_rows(device, LLAMA_COPIES if device.type != "cpu" else TINY_COPIES, printed)
    if asked.json is not None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu: not a measurement of copies"
        found = {"command": shlex.join(sys.argv), "device": name, "torch": torch.__version__}
        asked.json.write_text(json.dumps({**found, "figures": printed.figures, "limits": printed.limits}, indent=2))


if __name__ == "__main__":
    main()
