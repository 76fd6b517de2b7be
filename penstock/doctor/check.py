"""The result of one doctor check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `note`: works, but could be better; `problem`: misconfigured; `unusable`: Penstock cannot run."""

    name: str
    status: Literal["ok", "note", "problem"]
    found: str
    advice: str = ""
    unusable: bool = False
