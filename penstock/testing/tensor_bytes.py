"""Which bytes of memory an aten operation reads and writes: exact where rows are chosen, the tensor's own elsewhere."""

from __future__ import annotations

from typing import Any

import torch

from penstock.testing.device_clock import Range

RUNS_MAX = 2048  # contiguous runs that a tensor is told apart into; beyond, its whole span counts


def is_view(func: Any) -> bool:
    """Whether the operation only gives a tensor's memory another shape."""
    returns = func._schema.returns
    alias = returns[0].alias_info if returns else None
    return bool(alias is not None and not alias.is_write) or func._schema.name == "aten::_unsafe_view"


def touched(func: Any, args: Any, kwargs: Any) -> tuple[list[Range], list[Range]]:
    """What it reads, what it writes."""
    name = func._schema.name.removeprefix("aten::")
    if name == "index_select":
        return _rows(args[0], args[1], args[2]), []
    if name == "index_copy_":
        return extents(args[3]), _rows(args[0], args[1], args[2])
    if name == "index_fill_":
        return [], _rows(args[0], args[1], args[2])
    if name in ("index_put_", "_index_put_impl_") and len(args[1]) == 2:
        first, second = (index.flatten().tolist() for index in args[1])
        return extents(args[2]), [r for i, j in zip(first, second, strict=True) for r in extents(args[0][i, j])]
    reads: list[Range] = []
    writes: list[Range] = []
    for argument, value in _named(func, args, kwargs):
        alias = argument.alias_info
        (writes if alias is not None and alias.is_write else reads).extend(extents(value))
    return reads, writes


def _named(func: Any, args: Any, kwargs: Any) -> list[tuple[Any, Any]]:
    arguments = func._schema.arguments
    given = list(zip(arguments, args, strict=False))
    return given + [(argument, kwargs[argument.name]) for argument in arguments if argument.name in kwargs]


def _rows(tensor: torch.Tensor, dim: int, index: torch.Tensor) -> list[Range]:
    return [each for at in index.flatten().tolist() for each in extents(tensor.select(dim, at))]


def extents(value: Any) -> list[Range]:
    """The contiguous runs of a tensor's memory, or of all tensors in a list."""
    if isinstance(value, list | tuple):
        return [each for item in value for each in extents(item)]
    if not isinstance(value, torch.Tensor) or not value.numel():
        return []
    size, base = value.element_size(), value.data_ptr()
    dims = sorted((stride, count) for stride, count in zip(value.stride(), value.shape, strict=True) if count > 1)
    run = 1
    while dims and dims[0][0] <= run:  # adjoining (or repeated) elements
        stride, count = dims.pop(0)
        run += stride * (count - 1)
    starts = [0]
    for stride, count in dims:
        if len(starts) * count > RUNS_MAX:
            span = run + sum(stride * (count - 1) for stride, count in dims)
            return [(base, base + span * size)]
        starts = [start + stride * at for start in starts for at in range(count)]
    return [(base + start * size, base + (start + run) * size) for start in starts]
