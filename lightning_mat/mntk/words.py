"""The plan of a pass in words: what the fused operation reads, see csrc/plan.h."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_mat.mntk.factors import KINDS, Geometry, Source
from lightning_mat.units.unit import Rect

Words = npt.NDArray[np.int64]

VERSION = 1
WAYS = ("staged", "chip", "ghost")
_LAYER, _SOURCE, _TARGET, _PIECE = 6, 20, 3, 5
_NO_GEOMETRY = Geometry((), (), (), ())


def piece_table(owned: Iterable[tuple[int, Rect]]) -> Words:
    """Return rows ``(unit, r0, r1, c0, c1)``, sorted by unit, of ``(unit, rectangle)`` pairs.

    Example:
        >>> piece_table([(1, Rect(0, 2, 0, 3)), (0, Rect(2, 4, 0, 3))]).tolist()
        [[0, 2, 4, 0, 3], [1, 0, 2, 0, 3]]
    """
    table = np.array([(unit, *rect) for unit, rect in owned], dtype=np.int64).reshape(-1, _PIECE)
    return table[np.argsort(table[:, 0], kind="stable")]


def layer_words(
    shape: tuple[int, int],
    way: str,
    sources: Sequence[tuple[int, Source]],
    targets: Words,
    pieces: Words,
    *,
    swapped: bool = False,
) -> Words:
    """Return the words of one layer.

    Args:
        shape: Rows and columns of its gradient.
        way: One of :data:`WAYS`.
        sources: Its sources, each with the place of its tensors in the operation's lists.
        targets: ``[n, 3]``: Gram, whether it is fresh, row of the eigenvalues or -1.
        pieces: ``[m, 5]``: target, r0, r1, c0, c1, sorted by target.
        swapped: Whether inputs and output gradients change places.
    """
    head = [*shape, WAYS.index(way), len(sources), len(targets), len(pieces)]
    for index, source in sources:
        g = source.geometry or _NO_GEOMETRY
        sizes = [[*values, *[1] * (3 - len(values))] for values in g[:4]]
        head += [KINDS.index(source.kind), index, int(swapped), source.first, source.samples]
        head += [
            int(source.adds),
            g.groups,
            len(g.kernel),
            *(size for values in sizes for size in values),
        ]
    return np.concatenate([np.array(head, dtype=np.int64), targets.ravel(), pieces.ravel()])


def plan_words(layers: Sequence[Words]) -> Tensor:
    """Return the words of a plan, int64 on the CPU."""
    head = np.array([VERSION, len(layers)], dtype=np.int64)
    return torch.from_numpy(np.concatenate([head, *layers]))


class LayerRecord(NamedTuple):
    """A layer of a plan, read back.

    Args:
        rows: Rows of its gradient.
        columns: Columns of its gradient.
        way: One of :data:`WAYS`.
        sources: ``[k, 20]`` words.
        targets: ``[n, 3]`` words.
        pieces: ``[m, 5]`` words.
    """

    rows: int
    columns: int
    way: str
    sources: Words
    targets: Words
    pieces: Words


def read_words(plan: Tensor) -> Iterator[LayerRecord]:
    """Yield the layers of a plan."""
    words = plan.numpy()
    at = 2
    for _ in range(int(words[1])):
        rows, columns, way, *counts = (int(word) for word in words[at : at + _LAYER])
        at += _LAYER
        parts = []
        for count, width in zip(counts, (_SOURCE, _TARGET, _PIECE), strict=True):
            parts.append(words[at : at + count * width].reshape(count, width))
            at += count * width
        yield LayerRecord(rows, columns, WAYS[way], *parts)
