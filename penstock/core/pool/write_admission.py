"""Whether SSDs take a new block: always, or only when it was looked up or written before."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal, get_args

from penstock.core.keys import BlockKey

WriteAdmissionMode = Literal["all", "reused"]
KEYS_MAX = 262_144  # about 40 MB of memory; 16 million tokens in blocks of 64


class WriteAdmission:
    """With `reused`, SSDs take a block only on its second sign of use: an earlier write, or two earlier lookups (the
    first lookup is that of the request which computes it). The last `keys_max` keys are remembered: one half of keys
    that were written, one of keys that were looked up. Lookups are cheap, so a flood of them must not displace the keys
    that were written."""

    def __init__(self, mode: WriteAdmissionMode = "all", keys_max: int = KEYS_MAX) -> None:
        """Raises ValueError for another mode or no keys."""
        if mode not in get_args(WriteAdmissionMode):
            raise ValueError(
                f"write admission is {mode!r}; it must be one of {', '.join(get_args(WriteAdmissionMode))}"
            )
        if keys_max < 1:
            raise ValueError(f"keys_max is {keys_max}; it must be at least 1")
        self.mode = mode
        self._half = max(1, keys_max // 2)
        self._written: OrderedDict[BlockKey, bool] = OrderedDict()
        self._asked: OrderedDict[BlockKey, bool] = OrderedDict()  # whether a second sign of use was seen

    def __len__(self) -> int:
        return len(self._written) + len(self._asked)

    def asked(self, key: BlockKey) -> None:
        """Note a lookup of a block that no SSD holds."""
        if self.mode == "reused":
            self._note(self._asked, key, key in self._asked or key in self._written)

    def admits(self, key: BlockKey) -> bool:
        """Whether SSDs may take this write; notes it."""
        if self.mode == "all":
            return True
        reused = key in self._written or self._asked.get(key, False)
        self._note(self._written, key, True)
        return reused

    def _note(self, keys: OrderedDict[BlockKey, bool], key: BlockKey, reused: bool) -> None:
        keys[key] = reused
        keys.move_to_end(key)
        if len(keys) > self._half:
            keys.popitem(last=False)
