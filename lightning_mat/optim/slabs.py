"""Slab: the part of one parameter that one unit owns, and the history that its state carries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_mat.shards import local_of, local_rects
from lightning_mat.units.core import Partition
from lightning_mat.units.regions import union
from lightning_mat.units.unit import Rect

Box = tuple[slice, ...]
"""An index into a parameter that gives the view of one rectangle."""

History = tuple[tuple[str, float], ...]
"""What the elements of a slab have in common: ``(key, value)`` of its scalar state (Adam's
``step``), and ``(key, 0.0)`` of every elementwise state tensor it has. Empty before its first
step. Slabs with equal histories may be stepped as one tensor."""


class Slab(NamedTuple):
    """What one unit owns of one parameter; ``unit`` is None for what no unit owns."""

    unit: int | None
    rects: tuple[Rect, ...]


def slabs_of(part: Partition, name: str) -> tuple[Slab, ...]:
    """Return the slabs of a parameter: disjoint, covering it, the unowned part last."""
    by_unit: dict[int | None, list[Rect]] = {}
    for unit, rect in part.owners[name]:
        by_unit.setdefault(unit, []).append(rect)
    free = [rect for block in part.free_blocks(name) for rect in block.rects()]
    if free:
        by_unit[None] = free
    return tuple(Slab(unit, tuple(sorted(rects))) for unit, rects in by_unit.items())


def boxes_of(rects: Sequence[Rect], shape: torch.Size) -> tuple[Box, ...]:
    """Return indices of the fewest boxes that cover some rectangles, in order.

    Example:
        >>> boxes_of([Rect(0, 2, 9, 18), Rect(2, 4, 9, 18)], torch.Size([4, 3, 3, 3]))
        ((slice(0, 4, None), slice(1, 2, None)),)
    """
    merged = sorted(rect for block in union(rects) for rect in block.rects())
    if len(shape) < 2:
        return tuple((slice(r.r0, r.r1),) for r in merged)
    # Column edges come from slices of dimension 1, so they are multiples of what lies below it.
    inner = max(prod(shape[2:]), 1)
    return tuple(
        (slice(r.r0, r.r1), slice(r.c0 // inner, r.c1 // inner))
        if r.c1 - r.c0 < inner * shape[1]
        else (slice(r.r0, r.r1),)
        for r in merged
    )


def boxes_in(param: Tensor, rects: Sequence[Rect]) -> tuple[Box, ...]:
    """Return indices into what this rank holds of a parameter that cover some rectangles of it."""
    return boxes_of(local_rects(param, rects), local_of(param).shape)


def is_elementwise(value: object, shape: torch.Size) -> bool:
    """Return whether a state value holds one number per element of a tensor of this shape."""
    return isinstance(value, Tensor) and value.shape == shape


def history_of(state: Mapping[str, Any], shape: torch.Size) -> History:
    """Return the history that the state of a tensor of the given shape carries.

    Raises:
        TypeError: If a value is neither a scalar nor elementwise.
    """
    history: dict[str, float] = {}
    for key, value in state.items():
        if value is None:
            continue
        if is_elementwise(value, shape):
            history[key] = 0.0
        elif isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1):
            history[key] = float(value)
        else:
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise TypeError(
                f"optimizer state {key!r} is neither a scalar nor one number per element of "
                f"{tuple(shape)} ({found}): such an update is not elementwise and cannot be sliced"
            )
    return tuple(sorted(history.items()))


def latest(histories: Sequence[History]) -> History:
    """Return the history with the most steps, which stands for the whole parameter."""
    return max(histories, key=lambda history: (len(history), dict(history).get("step", 0.0)))


def pack_histories(slabs: Sequence[Slab], histories: Sequence[History]) -> dict[str, Any]:
    """Return the histories of one parameter's slabs as tensors, for a checkpoint.

    Returns:
        ``"slabs"``: int64 ``[n, 5]``, one row ``(slab, r0, r1, c0, c1)`` per rectangle;
        ``"history"``: per state key a float64 tensor ``[number of slabs]``, NaN where a slab has
        no such state.
    """
    rows = [(i, *rect) for i, slab in enumerate(slabs) for rect in slab.rects]
    tables = [dict(history) for history in histories]
    keys = sorted({key for table in tables for key in table})
    return {
        "slabs": torch.tensor(rows, dtype=torch.int64),
        "history": {
            key: torch.tensor([t.get(key, torch.nan) for t in tables], dtype=torch.float64)
            for key in keys
        },
    }


def unpack_histories(slabs: Sequence[Slab], packed: Mapping[str, Any]) -> list[History] | None:
    """Return the histories that :func:`pack_histories` packed, or None for other slabs."""
    saved = saved_histories(packed)
    if set(saved) != {slab.rects for slab in slabs}:
        return None
    return [saved[slab.rects] for slab in slabs]


def saved_histories(packed: Mapping[str, Any]) -> dict[tuple[Rect, ...], History]:
    """Return the rectangles of each slab that :func:`pack_histories` packed → its history."""
    rects: dict[int, list[Rect]] = {}
    for index, *edges in packed["slabs"].tolist():
        rects.setdefault(index, []).append(Rect(*edges))
    columns = {key: values.tolist() for key, values in packed["history"].items()}
    return {
        tuple(sorted(owned)): tuple(
            (key, values[index])
            for key, values in sorted(columns.items())
            if values[index] == values[index]  # NaN: the slab has no such state
        )
        for index, owned in rects.items()
    }
