"""Attention over pages, as Hugging Face models call it: writes a batch's new KV into L1, then attends chunk by chunk.

Penstock writes no model code. The attention function is registered under ATTENTION_NAME; the model is handed all chunks
of a batch as one row of tokens with explicit positions, and builds no mask because no mask function has that name.
What a call belongs to travels in a context variable, so models in several threads do not see each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from penstock.device.accelerator import Accelerator
from penstock.engine.paged_kv import PagedKV
from penstock.engine.runner import Chunk, UploadGroup

ATTENTION_NAME = "penstock_paged"
MASK_ELEMENTS_MAX = 1 << 21  # of one mask; longer chunks are attended slice by slice, which is faster as well
SCORE_ELEMENTS_MAX = 1 << 26  # of one explicit score matrix, over all heads
SLICE_ROWS_MIN = 16  # the limits above give way to this
DECODE_PADDING_RATIO_MAX = 2.0  # padded over real tokens of decode chunks attended together

Pages = Sequence[int] | np.ndarray


@dataclass(frozen=True, slots=True)
class AttentionArgs:
    """What varies between layers: the scale, how many last tokens are seen (0: all), sink logits, score capping."""

    scaling: float
    window: int
    sinks: torch.Tensor | None
    softcap: float | None


class Attend(Protocol):
    """Receives every attention call of a forward pass: query `[1, heads, q, d]`, key and value `[1, kv_heads, q, d]`;
    gives `[1, q, heads, value_dim]`."""

    def attend(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, args: AttentionArgs
    ) -> torch.Tensor:
        """Attention of one layer over the batch; shapes as above."""


_current: ContextVar[Attend | None] = ContextVar("penstock_attend", default=None)


@contextmanager
def attending(target: Attend) -> Iterator[None]:
    """Within this context (of this thread), models with Penstock's attention call `target`."""
    token = _current.set(target)
    try:
        yield
    finally:
        _current.reset(token)


def paged_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The function that transformers calls for each layer."""
    target = _current.get()
    if target is None:
        raise RuntimeError(f"{ATTENTION_NAME} was called outside of a Penstock batch")
    if attention_mask is not None:
        raise ValueError(f"{ATTENTION_NAME} got an attention mask; only plain causal models are served")
    for name in ("position_bias", "cache"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{ATTENTION_NAME} got `{name}`, which it does not know")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return target.attend(module, query, key, value, AttentionArgs(scale, sliding_window or 0, s_aux, softcap)), None


def register() -> None:
    """Make ATTENTION_NAME known to transformers; may be called again."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, paged_attention)


@dataclass(frozen=True, slots=True)
class _Span:
    """One chunk's rows `[first_row, end_row)` of the batch, its positions `[start, end)` and its pages."""

    first_row: int
    end_row: int
    start: int
    end: int
    pages: Pages


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """Single-token chunks attended together: rows `[b]`, pages `[b, p]`, mask `[b, 1, 1, p * block_tokens]`. `seen`:
    the first and the end of the tokens of these pages that the mask lets see, where there is one chunk."""

    rows: torch.Tensor
    pages: torch.Tensor
    mask: torch.Tensor
    seen: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class _DecodePlan:
    """A `_DecodeGroup` to be: the numbers in the parcel of its rows, pages, where each chunk is and where its first
    page begins; and `seen`."""

    numbers: tuple[int, int, int, int]
    seen: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class PageTables:
    """The chunks of a batch for a kernel that reads pages where they lie, int32: pages `[chunks, p]`, where each
    chunk's context ends `[chunks]`, and at which rows of the batch they begin and end `[chunks + 1]`. `rows_max` are
    the rows of the longest chunk."""

    pages: torch.Tensor
    ends: torch.Tensor
    rows: torch.Tensor
    rows_max: int


class PagedKernel(Protocol):
    """Attention over pages without gathering them."""

    def attend(
        self, query: torch.Tensor, view: torch.Tensor, kv_heads: int, tables: PageTables, args: AttentionArgs
    ) -> torch.Tensor:
        """See `paged_kernel.VarlenKernel`."""


class _Parcel:
    """Lists of integers that go to the device in one copy."""

    def __init__(self, arrays: Sequence[np.ndarray] = ()) -> None:
        self.arrays = list(arrays)
        self._sent: list[torch.Tensor] = []

    def add(self, values: Sequence[int] | np.ndarray) -> int:
        """Its number, by which `get` gives it once all are sent."""
        self.arrays.append(np.asarray(values, np.int64))
        return len(self.arrays) - 1

    def send(self, accelerator: Accelerator) -> torch.Tensor:
        """Copy all of them to the device; gives them one behind the other."""
        flat = accelerator.array_to_device(np.concatenate([array.ravel() for array in self.arrays]))
        self.use(flat)
        return flat

    def use(self, flat: torch.Tensor) -> None:
        """What `get` gives is part of `flat`, which may lack the last one."""
        self._sent, at = [], 0
        for array in self.arrays:
            part = flat[at : at + array.size]
            self._sent.append(part.view(array.shape) if len(part) == array.size else part)
            at += array.size

    def get(self, number: int) -> torch.Tensor:
        """On the device, in its shape."""
        return self._sent[number]


class PagedBatch:
    """One batch on its way through the layers. What it needs on the device goes there in one copy."""

    def __init__(
        self,
        kv: PagedKV,
        batch: Sequence[Chunk],
        pages: Sequence[Pages],
        windows: Iterable[int],
        kernel: PagedKernel | None = None,
    ) -> None:
        """`pages` of each chunk, as far as it uses them; arrays of those with one token. `windows` are those of the
        model's layers (0: all tokens are seen). `kernel` attends instead of what gathers pages."""
        self._kv = kv
        self._block_tokens = size = kv.layout.block_tokens
        self._pending: tuple[UploadGroup, ...] = tuple(
            {id(group): group for chunk in batch for group in chunk.pending}.values()
        )
        spans: list[_Span] = []
        positions, slot_pages, row = [], [], 0
        for chunk, used in zip(batch, pages, strict=True):
            end = chunk.start + len(chunk.tokens)
            spans.append(_Span(row, row + len(chunk.tokens), chunk.start, end, used))
            row += len(chunk.tokens)
            at = np.arange(chunk.start, end)
            positions.append(at)
            slot_pages.append(np.asarray(used, np.int64)[at // size])
        self._kernel = kernel
        self._prefills = [span for span in spans if span.end - span.start > 1]
        self._decodes = sorted((span for span in spans if span.end - span.start == 1), key=lambda span: span.end)
        self._parcel = _Parcel()
        add = self._parcel.add
        tokens = add([token for chunk in batch for token in chunk.tokens])
        sampled = add(
            [span.end_row - 1 for span, chunk in zip(spans, batch, strict=True) if chunk.sampling is not None]
        )
        at_positions = np.concatenate(positions)
        numbers = add(at_positions), add(np.concatenate(slot_pages)), add(at_positions % size)
        self._tables_in_parcel = self._add_tables(spans) if kernel is not None else None
        windows = set(windows) if kernel is None else ()
        self._prefill_pages = {
            (span.first_row, window): add(span.pages[self._first_page(span.start, window) : -(-span.end // size)])
            for span in self._prefills
            for window in windows
        }
        decode_groups = {window: list(self._plan_decodes(window)) for window in windows}
        self._begun = add(self._begun_pages())
        self._numbers = (tokens, sampled, *numbers)
        self._rows_max = max(span.end - span.start for span in spans)
        self.inputs = self._parcel.send(kv.accelerator)
        self._take_inputs()
        get = self._parcel.get
        self._decode_groups = {
            window: [self._decode_group(group, window) for group in groups] for window, groups in decode_groups.items()
        }
        begun = get(self._begun)
        if len(begun):
            kv.clear(begun)
            self.inputs = self.inputs[: -len(begun)]

    def _take_inputs(self) -> None:
        get = self._parcel.get
        self.tokens, self.sampled_rows, self.positions, self._slot_pages, self._slot_offsets = map(get, self._numbers)
        self._tables: PageTables | None = None

    @property
    def graph_key(self) -> tuple[int, ...] | None:
        """Batches of the same key differ in `inputs` only; None where more is different."""
        if self._kernel is None or self._rows_max > 1 or self._pending:
            return None
        return len(self.tokens), len(self.sampled_rows), self.inputs.numel()

    def with_inputs(self, inputs: torch.Tensor) -> PagedBatch:
        """The same batch, of inputs that are somewhere else; one with a `graph_key`."""
        other = copy(self)
        other.move_to(inputs)
        return other

    def move_to(self, inputs: torch.Tensor) -> None:
        """See `with_inputs`."""
        self._parcel = _Parcel(self._parcel.arrays)
        self._parcel.use(inputs)
        self.inputs = inputs
        self._take_inputs()

    def _page_tables(self) -> PageTables:
        """Made by the first layer, as part of the forward pass."""
        if self._tables is None:
            assert self._tables_in_parcel is not None
            columns, ends, row_ends = (self._parcel.get(number).int() for number in self._tables_in_parcel)
            self._tables = PageTables(columns, ends, row_ends, self._rows_max)
        return self._tables

    def begin(self) -> None:
        """A forward pass begins."""
        self._tables = None

    def _add_tables(self, spans: Sequence[_Span]) -> tuple[int, int, int]:
        """Numbers in the parcel of what `PageTables` holds; the tables have a power of two of columns."""
        size = self._block_tokens
        width = max(-(-span.end // size) for span in spans)
        pages = np.empty((len(spans), 1 << (width - 1).bit_length()), np.int64)
        for row, span in zip(pages, spans, strict=True):
            count = -(-span.end // size)
            row[:count] = span.pages[:count]
            row[count:] = row[0]
        add = self._parcel.add
        return add(pages), add([span.end for span in spans]), add([0, *(span.end_row for span in spans)])

    def _begun_pages(self) -> list[int]:
        """The pages that this batch begins and does not fill, at most one per chunk. They are zeroed: decodes read all
        of a page and mask what is not there yet, and a NaN that an earlier owner left would spread."""
        size = self._block_tokens
        return [
            int(span.pages[span.end // size])
            for span in (*self._prefills, *self._decodes)
            if span.end % size and span.end // size * size >= span.start
        ]

    def attend(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, args: AttentionArgs
    ) -> torch.Tensor:
        """Store the new KV of the layer, then attend; waits for uploads of this layer, and of no other."""
        layer = int(module.layer_idx)
        for group in self._pending:
            group.wait_layer(layer)
        rows = query.shape[2]
        view = self._kv.layer_view(layer)
        flat_key, flat_value = key[0].transpose(0, 1).flatten(1), value[0].transpose(0, 1).flatten(1)
        view[self._slot_pages, self._slot_offsets] = torch.cat((flat_key, flat_value), dim=1).to(view.dtype)
        if self._kernel is not None:
            return self._kernel.attend(query[0].transpose(0, 1), view, key.shape[1], self._page_tables(), args)[None]
        output = query.new_empty((1, rows, query.shape[1], value.shape[-1]))
        for span in self._prefills:
            chunk_query = query[0, :, span.first_row : span.end_row]
            output[0, span.first_row : span.end_row] = self._prefill(layer, span, chunk_query, args).transpose(0, 1)
        for decode in self._decode_groups[args.window]:
            heads = query[0].index_select(1, decode.rows).transpose(0, 1)
            output[0, decode.rows] = self._decode(layer, decode, heads, args)
        return output

    def _gather(self, layer: int, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of pages `[..., p]`: `[..., kv_heads, p * block_tokens, d]`."""
        shape = self._kv.shapes[layer]
        gathered = self._kv.gather(layer, pages.flatten())
        tokens = gathered.view(*pages.shape[:-1], pages.shape[-1] * self._block_tokens, shape.elements_per_token)
        keys, values = tokens.split((shape.key_elements, shape.kv_heads * shape.value_dim), dim=-1)
        return (
            keys.unflatten(-1, (shape.kv_heads, shape.key_dim)).transpose(-3, -2),
            values.unflatten(-1, (shape.kv_heads, shape.value_dim)).transpose(-3, -2),
        )

    def _first_page(self, start: int, window: int) -> int:
        """Index (within the request) of the first page that a query at `start` sees."""
        return max(0, start - window + 1) // self._block_tokens if window else 0

    def _prefill(self, layer: int, span: _Span, query: torch.Tensor, args: AttentionArgs) -> torch.Tensor:
        """Query `[heads, q, d]` of one chunk against its prefix and itself; gives `[heads, q, value_dim]`."""
        first_page = self._first_page(span.start, args.window)
        keys, values = self._gather(layer, self._parcel.get(self._prefill_pages[span.first_row, args.window]))
        first = first_page * self._block_tokens
        keys, values = keys[:, : span.end - first].to(query.dtype), values[:, : span.end - first].to(query.dtype)
        return causal_attention(query, keys, values, span.start - first, args)

    def _plan_decodes(self, window: int) -> Iterator[_DecodePlan]:
        """Group single-token chunks of similar length, shortest first, so that padding stays bounded."""
        waiting: list[tuple[_Span, int, int]] = []  # span, its first page, its page count
        used_pages = 0
        for span in self._decodes:
            first = self._first_page(span.start, window)
            count = -(-span.end // self._block_tokens) - first
            if waiting and (len(waiting) + 1) * count > DECODE_PADDING_RATIO_MAX * (used_pages + count):
                yield self._add_decodes(waiting, window)
                waiting, used_pages = [], 0
            waiting.append((span, first, count))
            used_pages += count
        if waiting:
            yield self._add_decodes(waiting, window)

    def _add_decodes(self, members: Sequence[tuple[_Span, int, int]], window: int) -> _DecodePlan:
        pages = np.empty((len(members), max(count for _, _, count in members)), np.int64)
        for row, (span, first, count) in zip(pages, members, strict=True):
            row[:count] = span.pages[first : first + count]
            row[count:] = row[0]
        add = self._parcel.add
        rows, starts = [span.first_row for span, _, _ in members], [span.start for span, _, _ in members]
        firsts = [first * self._block_tokens for _, first, _ in members]
        seen = None
        if len(members) == 1:
            low = max(0, starts[0] - window + 1) if window else 0
            seen = (low - firsts[0], starts[0] + 1 - firsts[0])
        return _DecodePlan((add(rows), add(pages), add(starts), add(firsts)), seen)

    def _decode_group(self, plan: _DecodePlan, window: int) -> _DecodeGroup:
        rows, pages, starts, firsts = map(self._parcel.get, plan.numbers)
        at = firsts[:, None] + torch.arange(pages.shape[1] * self._block_tokens, device=pages.device)[None, :]
        mask = at <= starts[:, None]
        if window:
            mask &= at > starts[:, None] - window
        return _DecodeGroup(rows, pages, mask[:, None, None], plan.seen)

    def _decode(self, layer: int, group: _DecodeGroup, query: torch.Tensor, args: AttentionArgs) -> torch.Tensor:
        """Query `[b, heads, d]`, one token of each chunk; gives `[b, heads, value_dim]`."""
        keys, values = self._gather(layer, group.pages)
        kv_heads = keys.shape[1]
        grouped = query.unflatten(1, (kv_heads, -1))  # heads that share keys are the query rows of one head
        keys, values = keys.to(query.dtype), values.to(query.dtype)
        if args.sinks is None and args.softcap is None and group.seen is not None and _takes_flash(query):
            low, high = group.seen
            return flash_decode(query, keys[:, :, low:high], values[:, :, low:high], args.scaling)
        if args.sinks is None and args.softcap is None:
            output = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=group.mask, scale=args.scaling)
        else:
            sinks = None if args.sinks is None else args.sinks.view(1, kv_heads, -1, 1)
            output = explicit_attention(grouped, keys, values, group.mask, sinks, args)
        return output.flatten(1, 2)


def causal_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, args: AttentionArgs
) -> torch.Tensor:
    """Query `[heads, q, d]` whose row i is position `start + i` of keys `[kv_heads, start + q, d]`; works in slices of
    rows, so that no mask of `[q, start + q]` comes to be. Gives `[heads, q, value_dim]`."""
    heads, rows, _ = query.shape
    kv_heads, total, _ = keys.shape
    explicit = args.sinks is not None or args.softcap is not None
    if not explicit and not args.window:
        if _takes_flash(query):
            return flash_causal_attention(query, keys, values, args.scaling)
        if start == 0:
            grouped = _grouped(query, keys, values)
            return F.scaled_dot_product_attention(*grouped, is_causal=True, scale=args.scaling).flatten(0, 1)
    limit = SCORE_ELEMENTS_MAX // heads if explicit else MASK_ELEMENTS_MAX
    seen = min(total, args.window + rows) if args.window else total
    step = max(SLICE_ROWS_MIN, min(rows, limit // seen))
    output = query.new_empty((heads, rows, values.shape[-1]))
    for low in range(0, rows, step):
        high = min(rows, low + step)
        first = max(0, start + low - args.window + 1) if args.window else 0
        end = start + high
        at = torch.arange(first, end, device=query.device)[None, :]
        row_at = torch.arange(start + low, end, device=query.device)[:, None]
        mask = at <= row_at
        if args.window:
            mask &= at > row_at - args.window
        rows_query, seen_keys, seen_values = query[:, low:high], keys[:, first:end], values[:, first:end]
        if explicit:
            sinks = None if args.sinks is None else args.sinks.view(kv_heads, -1, 1, 1)
            grouped_query = rows_query.unflatten(0, (kv_heads, -1))
            part = explicit_attention(grouped_query, seen_keys, seen_values, mask, sinks, args)
        else:
            grouped = _grouped(rows_query, seen_keys, seen_values)
            part = F.scaled_dot_product_attention(*grouped, attn_mask=mask, scale=args.scaling)
        output[:, low:high] = part.flatten(0, 1)
    return output


def _takes_flash(query: torch.Tensor) -> bool:
    """Whether a kernel without masks is faster: it divides long contexts among processors, which those with a mask do
    not."""
    return query.dtype in (torch.bfloat16, torch.float16) and _has_flash(query.device)


@lru_cache
def _has_flash(device: torch.device) -> bool:
    return device.type == "cuda" and bool(torch.cuda.get_device_capability(device) >= (8, 0))


def _grouped(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`[kv_heads, heads per kv head, tokens, d]` of each, without copying keys or values."""
    grouped = query.unflatten(0, (keys.shape[0], -1))
    shared = (-1, grouped.shape[1], -1, -1)
    return grouped, keys[:, None].expand(shared), values[:, None].expand(shared)


def flash_causal_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
) -> torch.Tensor:
    """What `causal_attention` gives, by a kernel that holds no mask (CUDA, 16-bit types; elsewhere torch makes the
    mask). Values narrower than keys are padded for it."""
    width = values.shape[-1]
    padded = F.pad(values, (0, keys.shape[-1] - width)) if width < keys.shape[-1] else values
    bias = causal_lower_right(query.shape[1], keys.shape[1])
    output = F.scaled_dot_product_attention(
        query[None],
        keys[None],
        padded[None],
        attn_mask=bias,
        scale=scaling,
        enable_gqa=query.shape[0] != keys.shape[0],
    )
    return output[0, :, :, :width]


def flash_decode(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
    """One token's query `[1, heads, d]` against all of keys and values `[1, kv_heads, tokens, d]`, without a mask;
    gives `[1, heads, value_dim]`. Values narrower than keys are padded for the kernel."""
    width = values.shape[-1]
    padded = F.pad(values, (0, keys.shape[-1] - width)) if width < keys.shape[-1] else values
    gqa = query.shape[1] != keys.shape[1]
    output = F.scaled_dot_product_attention(query[:, :, None], keys, padded, scale=scaling, enable_gqa=gqa)
    return output[:, :, 0, :width]


def explicit_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    sinks: torch.Tensor | None,
    args: AttentionArgs,
) -> torch.Tensor:
    """Attention with sink logits (each head's share that goes to no token; broadcastable to one column of the scores)
    or capped scores, in float32. Shapes as for scaled_dot_product_attention; or query `[kv_heads, heads per kv head, q,
    d]` with keys and values `[kv_heads, tokens, d]`, which are not expanded then."""
    shape = query.shape[:-1]
    if keys.dim() < query.dim():  # heads that share keys are further rows of one head
        query = query.flatten(-3, -2)
    scores = (query @ keys.transpose(-2, -1)).float() * args.scaling
    scores = scores.view(*shape, -1)
    if args.softcap is not None:
        scores = torch.tanh(scores / args.softcap) * args.softcap
    scores = scores.masked_fill_(~mask, float("-inf"))
    if sinks is not None:
        column = sinks.float().expand(*scores.shape[:-1], 1)
        weights = torch.cat((scores, column), dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    weights = weights.to(values.dtype).view(*query.shape[:-1], -1)
    return (weights @ values).view(*shape, -1)
