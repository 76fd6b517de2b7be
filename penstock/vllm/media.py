"""Identifies a request's images, sounds and videos for block keys: by the content the model gets, at their tokens.

vLLM's own identifiers do not suffice: a client may choose one (`multi_modal_uuids`, `uuid` of a part), even one that
looks like a hash, or one that vLLM hashes together with its options.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from penstock.core.keys import Span

if TYPE_CHECKING:
    from vllm.v1.request import Request

ITEMS_MAX = 4096  # items whose digest is remembered while vLLM's own cache holds them; about 300 bytes each
ALGORITHM = "sha256"
FAST_ALGORITHM = "blake3"  # vLLM's default; a fifth of the time


class Media:
    """Threading: for vLLM's scheduler thread."""

    def __init__(self) -> None:
        self._known: OrderedDict[int, tuple[weakref.ref[Any], str]] = OrderedDict()

    def spans(self, request: Request) -> list[Span] | None:
        """The request's media with their token positions; None if an item's content is not in this process
        (`--mm-processor-cache-type shm`)."""
        spans = []
        for feature in request.mm_features:
            content = self._content_of(feature.data)
            if content is None:
                return None
            position = feature.mm_position
            spans.append(Span(position.offset, position.length, f"{feature.modality}:{content}".encode()))
        return spans

    def _content_of(self, item: Any) -> str | None:
        known = self._known.get(id(item))
        if known is not None and known[0]() is item:
            self._known.move_to_end(id(item))
            return known[1]
        data: dict[str, Any] = {} if item is None else item.get_data()
        if not _has_tensor(data):
            return None
        content = _digest(data)
        self._known[id(item)] = (weakref.ref(item), content)
        self._known.move_to_end(id(item))
        while len(self._known) > ITEMS_MAX:
            self._known.popitem(last=False)
        return content


def _digest(data: dict[str, Any]) -> str:
    from vllm.multimodal.hasher import MultiModalHasher

    algorithm = ALGORITHM if find_spec(FAST_ALGORITHM) is None else FAST_ALGORITHM
    return f"{algorithm}:{MultiModalHasher.hash_kwargs(algorithm, data=_sorted(data))}"


def _sorted(data: dict[str, Any]) -> dict[str, Any]:
    return {name: data[name] for name in sorted(data)}


def _has_tensor(data: Any) -> bool:
    """Whether the item has numeric content, and not just a token position."""
    import torch

    if isinstance(data, dict):
        return any(_has_tensor(one) for one in data.values())
    if isinstance(data, (list, tuple)):
        return any(_has_tensor(one) for one in data)
    return isinstance(data, torch.Tensor)
