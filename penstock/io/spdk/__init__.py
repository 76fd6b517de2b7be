"""The `spdk` block engine: NVMe drives and fabric targets driven from user space by the user's own SPDK."""

from penstock.io.spdk.engine import SpdkEngine, open_spdk
from penstock.io.spdk.environment import SpdkEnvironment

__all__ = ["SpdkEngine", "SpdkEnvironment", "open_spdk"]
