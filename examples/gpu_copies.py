"""What copies of KV blocks reach on a GPU, with nothing installed but torch and numpy, from a checkout of Penstock:

    PYTHONPATH=. python examples/gpu_copies.py --json gpu-copies.json

Blocks of 8 MiB (Llama 3.1 8B) go up and down as Penstock's engine moves them and as its connector does inside vLLM, in
vLLM's layouts, beside one plain copy of as many bytes; and what that costs the host. A part that fails leaves the
figures of the others, and the reason in "errors". `penstock bench gpu` measures the rest. Without a GPU `--device cpu`
shows that it runs; only the `host_` figures mean something then.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from penstock.bench.gpu_copies import LLAMA_COPIES, TINY_COPIES, measure_groups, measure_host, measure_rows


class Printed:
    """Figures, printed and written as they come."""

    def __init__(self, file: Path | None, device: str) -> None:
        self.file = file
        self.found: dict[str, object] = {
            "command": shlex.join(sys.argv),
            "device": device,
            "torch": torch.__version__,
            "runtime": torch.version.cuda or torch.version.hip,
        }
        self.figures: dict[str, float] = {}
        self.limits: dict[str, float] = {}
        self.errors: list[str] = []

    def figure(self, name: str, value: float, limit: float | None = None) -> None:
        """Record a figure, and its goal."""
        self.figures[name] = value
        if limit is not None:
            self.limits[name] = limit
        self.write()
        print(f"{name:48} {value:10.4g}   goal {limit:.4g}" if limit is not None else f"{name:48} {value:10.4g}")

    def part(self, name: str, measure: Callable[[], None]) -> None:
        """Measure, and go on whatever happens."""
        try:
            measure()
        except Exception as error:  # noqa: BLE001 (whatever a device raises)
            traceback.print_exc()
            self.errors.append(f"{name}: {type(error).__name__}: {error}")
            self.write()

    def write(self) -> None:
        """What there is so far."""
        if self.file is not None:
            said = {**self.found, "figures": self.figures, "limits": self.limits, "errors": self.errors}
            self.file.write_text(json.dumps(said, indent=2))


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the figures here")
    asked = parser.parse_args()
    device = torch.device(asked.device)
    on_gpu = device.type != "cpu"
    sizes = LLAMA_COPIES if on_gpu else TINY_COPIES
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu: not a measurement of copies"
    printed = Printed(asked.json, name)
    printed.part("host", lambda: measure_host(LLAMA_COPIES, printed))
    printed.part("vllm", lambda: measure_rows(device, sizes, printed))
    printed.part("copies", lambda: measure_groups(device, sizes, printed))
    sys.exit(1 if printed.errors else 0)


if __name__ == "__main__":
    main()
