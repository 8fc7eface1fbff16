"""Arithmetic on the rectangles of one parameter: who owns what, and what trains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from lightning_mat.units.unit import Rect

Run = tuple[int, int]


@dataclass(frozen=True)
class Block:
    """The product of some runs of rows and some runs of columns of one parameter."""

    rows: tuple[Run, ...]
    columns: tuple[Run, ...]

    @property
    def n_rows(self) -> int:
        """Rows in all runs."""
        return sum(b - a for a, b in self.rows)

    @property
    def n_columns(self) -> int:
        """Columns in all runs."""
        return sum(b - a for a, b in self.columns)

    @property
    def numel(self) -> int:
        """Elements of the block."""
        return self.n_rows * self.n_columns

    def rects(self) -> list[Rect]:
        """Return the rectangles of which the block is made."""
        return [Rect(a, b, c, d) for a, b in self.rows for c, d in self.columns]


def merge_runs(runs: Iterable[Run]) -> tuple[Run, ...]:
    """Return sorted runs in which neighbours and overlaps are one.

    Example:
        >>> merge_runs([(4, 6), (0, 2), (2, 4), (9, 10)])
        ((0, 6), (9, 10))
    """
    merged: list[Run] = []
    for start, stop in sorted(runs):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(merged)


def _bands(rects: Sequence[Rect]) -> Iterable[tuple[Run, list[int]]]:
    """Yield ``(rows, indices of the rects that cover them)`` from the top down, without gaps."""
    # A parameter without elements has rectangles without elements: they cover nothing.
    starts = sorted((i for i, r in enumerate(rects) if r.numel), key=lambda i: rects[i].r0)
    cuts = sorted({edge for i in starts for edge in (rects[i].r0, rects[i].r1)})
    alive: list[int] = []
    position = 0
    for top, bottom in pairwise(cuts):
        alive = [i for i in alive if rects[i].r1 > top]
        while position < len(starts) and rects[starts[position]].r0 <= top:
            alive.append(starts[position])
            position += 1
        if alive:
            yield (top, bottom), alive


def union(rects: Sequence[Rect]) -> tuple[Block, ...]:
    """Return disjoint blocks that cover the union of some rectangles.

    Bands of rows that need the same columns are one block, so that rows alone, or columns alone,
    always give a single block.

    Example:
        >>> union([Rect(0, 2, 0, 8), Rect(4, 6, 0, 8)])
        (Block(rows=((0, 2), (4, 6)), columns=((0, 8),)),)
    """
    by_columns: dict[tuple[Run, ...], list[Run]] = {}
    for rows, alive in _bands(rects):
        columns = merge_runs((rects[i].c0, rects[i].c1) for i in alive)
        by_columns.setdefault(columns, []).append(rows)
    return tuple(Block(merge_runs(rows), columns) for columns, rows in by_columns.items())


def complement(rects: Sequence[Rect], rows: int, columns: int) -> tuple[Block, ...]:
    """Return disjoint blocks that cover what the rectangles leave of a ``rows`` × ``columns``.

    Example:
        >>> complement([Rect(1, 2, 0, 3)], 3, 3)
        (Block(rows=((0, 1), (2, 3)), columns=((0, 3),)),)
    """
    if rows * columns == 0:
        return ()
    by_columns: dict[tuple[Run, ...], list[Run]] = {}
    row = 0
    for (top, bottom), alive in [*_bands(rects), ((rows, rows), [])]:
        if top > row:
            by_columns.setdefault(((0, columns),), []).append((row, top))
        row = bottom
        taken = merge_runs((rects[i].c0, rects[i].c1) for i in alive)
        edges = [0, *(edge for run in taken for edge in run), columns]
        free = tuple((a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b > a)
        if free and bottom > top:
            by_columns.setdefault(free, []).append((top, bottom))
    return tuple(Block(merge_runs(r), c) for c, r in by_columns.items())


def first_overlap(rects: Sequence[Rect], owners: Sequence[int]) -> tuple[int, int] | None:
    """Return two indices whose rectangles share an element and have different owners, or None."""
    for _, alive in _bands(rects):
        if len(alive) < 2:
            continue
        ordered = sorted(alive, key=lambda i: rects[i].c0)
        reach = ordered[0]
        for i in ordered[1:]:
            if rects[i].c0 < rects[reach].c1 and owners[i] != owners[reach]:
                return reach, i
            if rects[i].c1 > rects[reach].c1:
                reach = i
    return None


def disjoint(rects: Sequence[Rect]) -> list[Rect]:
    """Return disjoint rectangles with the same union: one owner's slices may cross each other."""
    if len(rects) == 1:
        return list(rects)
    return sorted(rect for block in union(rects) for rect in block.rects())
