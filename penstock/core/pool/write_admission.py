"""Whether a block may wear a drive: at once, or only when it was asked for or written before."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal, get_args

from penstock.core.keys import BlockKey

WriteAdmissionMode = Literal["all", "reused"]
KEYS_MAX = 262_144  # about 40 MB of memory; 16 million tokens in blocks of 64
_WRITTEN, _ASKED, _WANTED = 1, 2, 3


class WriteAdmission:
    """With `reused`, SSDs take a block only on its second sign of use: an earlier write, or two earlier lookups (the
    first lookup is that of the request which computes it). What was seen is remembered for the last `keys_max` keys."""

    def __init__(self, mode: WriteAdmissionMode = "all", keys_max: int = KEYS_MAX) -> None:
        """Raises ValueError for another mode or no keys."""
        if mode not in get_args(WriteAdmissionMode):
            raise ValueError(
                f"write admission is {mode!r}; it must be one of {', '.join(get_args(WriteAdmissionMode))}"
            )
        if keys_max < 1:
            raise ValueError(f"keys_max is {keys_max}; it must be at least 1")
        self.mode = mode
        self._keys_max = keys_max
        self._seen: OrderedDict[BlockKey, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._seen)

    def asked(self, key: BlockKey) -> None:
        """Note a lookup of a block that no SSD holds."""
        if self.mode == "reused":
            self._note(key, _ASKED if key not in self._seen else _WANTED)

    def admits(self, key: BlockKey) -> bool:
        """Whether SSDs may take this write; notes it."""
        if self.mode == "all":
            return True
        seen = self._seen.get(key, 0)
        self._note(key, max(seen, _WRITTEN) if seen != _ASKED else _WRITTEN)
        return seen in (_WRITTEN, _WANTED)

    def _note(self, key: BlockKey, seen: int) -> None:
        self._seen[key] = seen
        self._seen.move_to_end(key)
        if len(self._seen) > self._keys_max:
            self._seen.popitem(last=False)
