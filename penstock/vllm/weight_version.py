"""Identifies the weights of a running vLLM: its initial weights, a named version, or weights unique to this engine.

vLLM lets weights be replaced while it runs, and signals it in two ways: by a reset of its caches including the
connector, and by a version that a trainer may give it (`finish_weight_update`, `update_weight_version`).
"""

from __future__ import annotations

import secrets

import msgspec


class WeightVersion:
    """`part` goes into the fingerprint. `scope` (the setting `weight_version`) names the run whose versions are shared;
    without it, every change of weights is unique to this engine."""

    def __init__(self, scope: str) -> None:
        self._scope = scope
        self._reported = "default"  # the version vLLM reports before it was given one
        self._fresh = False  # reset, and no results of a step since
        self.part = _named(scope, "") if scope else ""

    @property
    def listens(self) -> bool:
        """Whether the results of the next step decide on the version's name."""
        return self._fresh and bool(self._scope)

    def reset(self) -> None:
        """Weights may have changed; no other engine shares them until they get a name."""
        self.part = msgspec.json.encode(["own", secrets.token_hex(16)]).decode()
        self._fresh = True

    def step_ended(self, reported: str | None) -> bool | None:
        """The results of a step came with vLLM's version (None: without one). Returns None if nothing changed, True
        if the weights have a name now, False if they changed without a reset, so that vLLM's own cache is of old
        weights."""
        fresh, self._fresh = self._fresh, False
        if reported is None or reported == self._reported:
            return None
        self._reported = reported
        if not fresh:
            return False
        if self._scope:
            self.part = _named(self._scope, reported)
            return True
        return None


def _named(scope: str, version: str) -> str:
    return msgspec.json.encode(["named", scope, version]).decode()
