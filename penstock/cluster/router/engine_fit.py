"""Checks whether an engine that registers is compatible with the registered ones, and whether these can serve."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.cluster.router.engine_registry import RegisteredEngine
from penstock.cluster.wire import EngineCard


def can_serve(engines: Sequence[RegisteredEngine], sidecar: bool) -> tuple[bool, str]:
    """Whether these engines can serve a request, and why not."""
    roles = {engine.card.role for engine in engines}
    if "mixed" in roles or ({"decode"} if sidecar else {"prefill", "decode"}) <= roles:
        return True, "ok"
    if not roles:
        return False, "no engine is registered"
    return False, f"only {roles.pop()} engines have registered; a request needs both, or a mixed one"


def misfit(card: EngineCard, others: Sequence[EngineCard], vocabulary: str = "") -> str | None:
    """One line with the reason why an engine cannot serve with the others; None when it can. `vocabulary`: digest of
    the router's tokenizer; not compared when one side has none."""
    if card.role == "decode" and not card.relay_address:
        return "a decode engine without the address of its relay"
    if card.vocab_size < 1 or card.block_tokens < 1 or card.block_bytes < 1 or card.max_context_tokens < 2:
        return "vocab_size, block_tokens, block_bytes or max_context_tokens is too small"
    if vocabulary and card.vocabulary and vocabulary != card.vocabulary:
        return "its checkpoint's tokenizer has another vocabulary than that of the router's --model; allowed: the same"
    if not others:
        return None
    for what in ("model", "block_tokens", "block_bytes", "vocab_size", "eos_token_ids"):
        mine, theirs = getattr(card, what), getattr(others[0], what)
        if mine != theirs:
            return f"its {what} is {mine!r}; {others[0].name} and the others have {theirs!r}"
    return None
