"""Slice and Unit: what can train, or rest, on its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

KINDS = ("head", "expert", "filter", "ffn", "layer")


class Rect(NamedTuple):
    """Rows ``[r0, r1)`` and columns ``[c0, c1)`` of a parameter seen as a matrix.

    A parameter of shape ``[n, ...]`` is seen as ``[n, numel / n]``, a scalar as ``[1, 1]``.
    """

    r0: int
    r1: int
    c0: int
    c1: int

    @property
    def numel(self) -> int:
        """Elements in the rectangle."""
        return (self.r1 - self.r0) * (self.c1 - self.c0)


def matrix_shape(shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
    """Return ``(rows, columns)`` of the matrix view that :class:`Rect` refers to.

    Example:
        >>> matrix_shape((64, 3, 3, 3)), matrix_shape((5,)), matrix_shape(())
        ((64, 27), (5, 1), (1, 1))
    """
    if len(shape) == 0:
        return 1, 1
    columns = 1
    for size in shape[1:]:
        columns *= size
    return shape[0], columns


@dataclass(frozen=True)
class Slice:
    """A slab of one parameter: all of it, or ``[start, stop)`` of dimension 0 or 1.

    Args:
        param: The parameter's name in ``model.named_parameters()``.
        dim: 0 (rows), 1 (columns), or None for the whole parameter.
        start: First index along ``dim``.
        stop: One past the last index along ``dim``; None means to the end.

    Example:
        >>> Slice("query.weight", 0, 64, 128).rect((768, 768))
        Rect(r0=64, r1=128, c0=0, c1=768)
        >>> Slice("query.bias").rect((768,))
        Rect(r0=0, r1=768, c0=0, c1=1)
    """

    param: str
    dim: int | None = None
    start: int = 0
    stop: int | None = None

    def rect(self, shape: torch.Size | tuple[int, ...]) -> Rect:
        """Return the elements of the slice in a parameter of the given shape.

        Raises:
            ValueError: If the dimension or the range does not fit the shape.
        """
        rows, columns = matrix_shape(shape)
        if self.dim is None:
            if self.start != 0 or self.stop is not None:
                raise ValueError(
                    f"slice of {self.param!r} has a range [{self.start}, {self.stop}) but dim=None "
                    "(the whole parameter): name the dimension, 0 or 1"
                )
            return Rect(0, rows, 0, columns)
        if self.dim not in (0, 1) or self.dim >= max(len(shape), 1):
            raise ValueError(
                f"slice of {self.param!r} is along dimension {self.dim}, but the parameter has "
                f"shape {tuple(shape)}: slice along 0 or 1, and along 1 only where it exists"
            )
        size = shape[self.dim] if len(shape) else 1
        stop = size if self.stop is None else self.stop
        if not 0 <= self.start < stop <= size:
            raise ValueError(
                f"slice [{self.start}, {stop}) along dimension {self.dim} does not fit "
                f"{self.param!r} of shape {tuple(shape)}: need 0 ≤ start < stop ≤ {size}"
            )
        if self.dim == 0:
            return Rect(self.start, stop, 0, columns)
        inner = columns // size
        return Rect(0, rows, self.start * inner, stop * inner)


@dataclass(frozen=True)
class Unit:
    """A named set of slices that trains or rests together (the paper's "module" θ^l).

    Args:
        name: Unique within a partition, e.g. ``"encoder.layer.3.head.5"``.
        kind: What it is; thresholds may differ per kind: one of :data:`KINDS`, or a user's own.
        layer: The layer it belongs to; the protecting rule keeps one unit per layer and kind.
        slices: What it owns.

    Raises:
        ValueError: If it owns nothing or has no name.
    """

    name: str
    kind: str
    layer: str
    slices: tuple[Slice, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "slices", tuple(self.slices))
        if not self.name:
            raise ValueError("a unit needs a name, got an empty string")
        if not self.slices:
            raise ValueError(f"unit {self.name!r} owns no slice: give it at least one Slice")

    def numel(self, shapes: Mapping[str, torch.Size]) -> int:
        """Return the elements in its slices, given every parameter's shape.

        Where slices of one unit cross, their common elements count twice here, and once in
        ``Partition.numel``.
        """
        return sum(s.rect(shapes[s.param]).numel for s in self.slices)
