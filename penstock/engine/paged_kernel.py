"""Attention that reads pages where they lie, by torch's `varlen_attn` with a block table.

Which devices, types and head sizes it takes is up to the installed flash attention (FA3 and later read pages, FA2 does
not), so a device has to show at start that it gives what attention over gathered pages gives; else that one is used.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from penstock.engine.attention import AttentionArgs, PageTables, causal_attention
from penstock.engine.paged_kv import PagedKV

log = logging.getLogger(__name__)

DEVICES = ("cuda",)  # kinds of devices that it is tried on
GATHERED = "gathered pages"
FLASH_VERSIONS = (None, "FA3", "FA4")  # as torch names them; None: what torch has by itself
TOLERANCE = 2e-2  # between kernels, of values around 1 in 16 bits


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What the kernel has to do for a layer: query heads, and how it attends."""

    layer: int
    heads: int
    args: AttentionArgs


class VarlenKernel:
    """Attention of a whole batch in one call per layer. `name` says which one it is."""

    def __init__(self, flash: str | None) -> None:
        self.name = "varlen_attn with a block table" + (f" ({flash})" if flash else "")
        self._heads_first = True  # of the log-sum-exps; torch's documentation and its code differ

    def attend(
        self, query: torch.Tensor, view: torch.Tensor, kv_heads: int, tables: PageTables, args: AttentionArgs
    ) -> torch.Tensor:
        """Query `[rows, heads, d]` of all chunks, whose own KV is in the pages already; `view` is a layer's pages
        `[pages, block_tokens, width]`, half keys, half values. Gives `[rows, heads, d]`."""
        keys, values = (part.unflatten(-1, (kv_heads, -1)) for part in view.chunk(2, dim=-1))
        found = _varlen(
            query.to(view.dtype),
            keys,
            values,
            tables.rows,
            None,
            tables.rows_max,
            tables.pages.shape[1] * view.shape[1],
            scale=args.scaling,
            window_size=(args.window - 1 if args.window else -1, 0),
            enable_gqa=query.shape[1] != kv_heads,
            seqused_k=tables.ends,
            block_table=tables.pages,
            **({} if args.sinks is None else {"return_aux": _lse()}),
        )
        if args.sinks is None:
            whole: torch.Tensor = found.to(query.dtype)
            return whole
        output, lse = found
        lse = lse.transpose(0, 1) if self._heads_first else lse
        share = torch.sigmoid(lse.float() - args.sinks.float())  # of the softmax that goes to tokens
        rest: torch.Tensor = (output * share[..., None]).to(query.dtype)
        return rest

    def check(self, kv: PagedKV, kind: LayerKind) -> None:
        """Compare with attention over gathered pages, on pages 0 to 2. Raises ValueError where the results differ, and
        whatever the kernel raises."""
        size, shape, view = kv.layout.block_tokens, kv.shapes[kind.layer], kv.layer_view(kind.layer)
        device, made = view.device, torch.Generator(view.device).manual_seed(1)
        view[:3] = torch.randn(view[:3].shape, generator=made, device=device).to(view.dtype)
        chunk = size // 2 + 1
        rows = kind.heads + 1 if chunk == kind.heads else chunk  # so that the order of the log-sum-exps shows
        ends = [2 * size + size // 2, size + 1]
        query = torch.randn((rows + 1, kind.heads, shape.key_dim), generator=made, device=device).to(view.dtype)
        tables = PageTables(
            torch.tensor([[2, 0, 1], [1, 2, 2]], dtype=torch.int32, device=device),
            torch.tensor(ends, dtype=torch.int32, device=device),
            torch.tensor([0, rows, rows + 1], dtype=torch.int32, device=device),
            rows,
        )
        keys, values = view.chunk(2, dim=-1)
        expected = []
        for first, end, pages, length in ((0, rows, [2, 0, 1], ends[0]), (rows, rows + 1, [1, 2], ends[1])):
            key, value = (
                part[pages].flatten(0, 1)[:length].unflatten(-1, (shape.kv_heads, -1)).transpose(0, 1)
                for part in (keys, values)
            )
            part = causal_attention(query[first:end].transpose(0, 1), key, value, length - (end - first), kind.args)
            expected.append(part.transpose(0, 1))
        for heads_first in (True, False):
            self._heads_first = heads_first
            try:
                found = self.attend(query, view, shape.kv_heads, tables, kind.args)
            except RuntimeError:
                if kind.args.sinks is None or not heads_first:
                    raise
                continue
            if bool(((found - torch.cat(expected)).abs() <= TOLERANCE).all()):
                return
        raise ValueError(f"layer {kind.layer} differs from attention over gathered pages")


def _varlen(*arguments: Any, **options: Any) -> Any:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(*arguments, **options)


def _lse() -> Any:
    from torch.nn.attention.varlen import AuxRequest

    return AuxRequest(lse=True)


def _flash_versions() -> Iterator[str | None]:
    """What torch attends with, one after the other, while the caller tries each; those that are not installed are left
    out."""
    from torch.nn import attention

    activate = getattr(attention, "activate_flash_attention_impl", None)
    restore = getattr(attention, "restore_flash_attention_impl", None)
    for version in FLASH_VERSIONS:
        if version is not None:
            if activate is None or restore is None:
                return
            try:
                activate(version)
            except Exception as error:  # noqa: BLE001 (whatever a package that is not there, or not right, raises)
                log.debug("%s: %s", version, error)
                continue
        yield version
        if version is not None and restore is not None:
            restore()


def proven_kernel(kv: PagedKV, kinds: Sequence[LayerKind]) -> VarlenKernel | None:
    """The first kernel that gives the right results for every kind of layer; None where none does. L1 is zeros before
    and after."""
    if kv.device.type not in DEVICES or kv.pages < 3 or any(kind.args.softcap is not None for kind in kinds):
        return None
    if any(kv.shapes[kind.layer].key_dim != kv.shapes[kind.layer].value_dim for kind in kinds):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    if "block_table" not in inspect.signature(varlen_attn).parameters:
        return None
    for flash in _flash_versions():
        kernel = VarlenKernel(flash)
        try:
            for kind in kinds:
                kernel.check(kv, kind)
        except Exception as error:  # noqa: BLE001 (a kernel that is not for this device may raise anything)
            log.debug("%s is not used: %s", kernel.name, error)
        else:
            return kernel
        finally:
            kv.data[:3].zero_()
    return None
