"""Selection: some runs of indices along one axis, taken out of a tensor or put back into one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_mat.units.regions import Run, merge_runs

# Below this mean length of a run one indexed copy beats a copy per run. Measured on a CPU with 4096
# tokens and a quarter of 2048 features: runs of 4, 1.2 ms indexed against 5.4; runs of 8, 5.4
# against 2.7; runs of 64, 4.9 against 0.7.
SHORT_RUN = 8

# Selections that are remembered of one: sequences of every length may ask for another.
KEPT = 64


class Selection:
    """Sorted, disjoint runs of indices along an axis of a given length.

    Args:
        runs: Pairs ``(start, stop)``; neighbours are merged already.
        size: Length of the axis.
        device: Where the tensors live.
        lazy: Build the index when it is first used. Otherwise it is built here, so that no training
            step copies anything from host to device.

    Example:
        >>> some = Selection([(0, 1), (2, 4)], 5, torch.device("cpu"))
        >>> some.take(torch.tensor([[10, 11, 12, 13, 14]]), 1)
        tensor([[10, 12, 13]])
        >>> len(some), some.whole
        (3, False)
    """

    def __init__(
        self, runs: Sequence[Run], size: int, device: torch.device, *, lazy: bool = False
    ) -> None:
        """Build the index where the runs are short."""
        self.runs: tuple[Run, ...] = tuple(runs)
        self._others: dict[tuple[tuple[Run, ...], int], Selection] = {}
        self.size = size
        self.count = sum(stop - start for start, stop in self.runs)
        self.whole = self.count == size
        # On an accelerator every copy is a launch: one indexed copy wins over several plain ones.
        short = device.type != "cpu" or self.count < SHORT_RUN * len(self.runs)
        self.indexed = short and len(self.runs) > 1
        self._device = device
        self._index: Tensor | None = None
        if self.indexed and not lazy:
            self.index(device)

    def __len__(self) -> int:
        """Return how many indices are selected."""
        return self.count

    def index(self, device: torch.device) -> Tensor:
        """Return the indices on a device; copied only if the model has moved since."""
        if self._index is None:
            indices = [i for start, stop in self.runs for i in range(start, stop)]
            self._index = torch.tensor(indices, dtype=torch.int64, device=device)
        if self._index.device != device:
            self._index = self._index.to(device)
        return self._index

    def take(self, tensor: Tensor, dim: int) -> Tensor:
        """Return the selected slices along ``dim``: a view of one run, a copy of several."""
        if self.whole:
            return tensor
        if len(self.runs) < 2:
            start = self.runs[0][0] if self.runs else 0
            return tensor.narrow(dim, start, self.count)
        if self.indexed:
            return _index_select(tensor, dim % tensor.dim(), self.index(tensor.device))
        return torch.cat([tensor.narrow(dim, a, b - a) for a, b in self.runs], dim)

    def copy(self, tensor: Tensor, dim: int) -> Tensor:
        """Return what :meth:`take` returns, but never a view that keeps all of ``tensor`` alive."""
        taken = self.take(tensor, dim)
        return taken.clone() if len(self.runs) == 1 and not self.whole else taken

    def put(self, values: Tensor, target: Tensor, dim: int) -> None:
        """Copy ``values`` over the selected slices of ``target`` along ``dim``."""
        if self.indexed:
            target.index_copy_(dim, self.index(target.device), values.to(target.dtype))
            return
        start = 0
        for a, b in self.runs:
            target.narrow(dim, a, b - a).copy_(values.narrow(dim, start, b - a))
            start += b - a

    def clear(self, target: Tensor, dim: int) -> None:
        """Write zeros over the selected slices of ``target`` along ``dim``."""
        if self.indexed:
            target.index_fill_(dim, self.index(target.device), 0)
            return
        for a, b in self.runs:
            target.narrow(dim, a, b - a).zero_()

    def add(self, values: Tensor, target: Tensor, dim: int) -> None:
        """Add ``values`` to the selected slices of ``target`` along ``dim``."""
        if self.indexed:
            target.index_add_(dim, self.index(target.device), values)
            return
        start = 0
        for a, b in self.runs:
            target.narrow(dim, a, b - a).add_(values.narrow(dim, start, b - a))
            start += b - a

    def like(self, runs: Sequence[Run], size: int) -> Selection:
        """Return other runs along an axis of another length, on the same device; made once."""
        key = (tuple(runs), size)
        if key not in self._others:
            if len(self._others) == KEPT:
                self._others.clear()
            self._others[key] = Selection(runs, size, self._device, lazy=True)
        return self._others[key]

    def clip(self, start: int, stop: int) -> Selection:
        """Return what is selected of ``[start, stop)``, counted from ``start``.

        Example:
            >>> Selection([(1, 3), (5, 8)], 8, torch.device("cpu")).clip(2, 6).runs
            ((0, 1), (3, 4))
        """
        runs = [(max(a, start) - start, min(b, stop) - start) for a, b in self.runs]
        return self.like([(a, b) for a, b in runs if a < b], stop - start)

    def meet(self, other: Selection) -> Selection:
        """Return what is selected in both.

        Example:
            >>> cpu = torch.device("cpu")
            >>> Selection([(0, 3), (6, 8)], 8, cpu).meet(Selection([(1, 7)], 8, cpu)).runs
            ((1, 3), (6, 7))
        """
        runs = [
            (max(a, c), min(b, d)) for a, b in self.runs for c, d in other.runs if a < d and c < b
        ]
        return self.like(runs, self.size)

    def within(self, kept: Selection) -> Selection:
        """Return the same indices counted among those of ``kept``, which holds them all.

        Example:
            >>> cpu = torch.device("cpu")
            >>> Selection([(4, 6)], 8, cpu).within(Selection([(0, 2), (4, 8)], 8, cpu)).runs
            ((2, 4),)
        """
        runs: list[Run] = []
        offset = position = 0
        for a, b in kept.runs:
            while position < len(self.runs) and self.runs[position][1] <= a:
                position += 1
            here = position
            while here < len(self.runs) and self.runs[here][0] < b:
                start, stop = self.runs[here]
                runs.append((max(a, start) - a + offset, min(b, stop) - a + offset))
                here += 1
            offset += b - a
        return Selection(merge_runs(runs), kept.count, self._device)


class Taken:
    """A tensor of which several readers take features, dimension 1, each selection copied once.

    Args:
        tensor: Shape ``[n, features, ...]``.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._taken: dict[tuple[Run, ...], Tensor] = {}

    def take(self, selection: Selection) -> Tensor:
        """Return the selected features."""
        if selection.runs not in self._taken:
            self._taken[selection.runs] = selection.take(self.tensor, 1)
        return self._taken[selection.runs]


def _index_select(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """Return the indexed slices, in the layout that the tensor has.

    Where the axis is innermost in memory, as with channels last, one copy over a matrix is four
    times as fast on a CPU as one over more dimensions, and eight times as fast as one that changes
    the layout.
    """
    if dim == 1 and tensor.dim() > 3 and tensor.movedim(1, -1).is_contiguous():
        return _index_select(tensor.movedim(1, -1), tensor.dim() - 1, index).movedim(-1, 1)
    if dim == tensor.dim() - 1 and dim > 1 and tensor.is_contiguous():
        taken = tensor.reshape(tensor.shape[:-1].numel(), -1).index_select(1, index)
        return taken.view(*tensor.shape[:-1], len(index))
    return tensor.index_select(dim, index)


def place(values: Tensor, target: Tensor, rows: Selection, columns: Selection) -> None:
    """Copy ``values`` over the selected rows (dimension 0) and columns (dimension 1) of ``target``.

    Args:
        values: Shape ``[len(rows), len(columns), ...]``.
        target: Shape ``[rows.size, columns.size, ...]``, changed in place.
        rows: Which of dimension 0.
        columns: Which of dimension 1.
    """
    if columns.whole:
        rows.put(values, target, 0)
        return
    start = 0
    for a, b in rows.runs:
        columns.put(values.narrow(0, start, b - a), target.narrow(0, a, b - a), 1)
        start += b - a
