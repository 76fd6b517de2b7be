"""Block engines: reads and writes by address on slab files and devices, without the page cache and without copies."""

from penstock.io.api import BlockEngine, IoCompletion, IoOp, QueueFull
from penstock.io.memory import aligned_buffer
from penstock.io.open import open_engine, open_nvme

__all__ = ["BlockEngine", "IoCompletion", "IoOp", "QueueFull", "aligned_buffer", "open_engine", "open_nvme"]
