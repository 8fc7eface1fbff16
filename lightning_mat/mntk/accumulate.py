"""Accumulator: adds parameters' per-sample gradients to Grams, and solves each as it completes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_mat.mntk import ops
from lightning_mat.mntk.cost import choose_way, possible_ways
from lightning_mat.mntk.factors import Factor, Source
from lightning_mat.mntk.plan import MAX_WORKSPACE
from lightning_mat.mntk.words import Words, layer_words, plan_words
from lightning_mat.units.regions import merge_runs

_MOST_WORKSPACE, _LEAST_WORKSPACE = 64 << 20, 4 << 20


def default_workspace(device: torch.device | str) -> int:
    """Return how many bytes of gradients are formed at a time: what the device's cache holds."""
    if torch.device(device).type != "cuda":
        return MAX_WORKSPACE
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(_MOST_WORKSPACE, max(_LEAST_WORKSPACE, cache // 2))


def check_workspace(workspace: int | None, device: torch.device | str) -> int:
    """Return the workspace's bytes: those asked for, or the device's default.

    Raises:
        ValueError: If it is not positive.
    """
    if workspace is None:
        return default_workspace(device)
    if not isinstance(workspace, int) or isinstance(workspace, bool) or workspace <= 0:
        raise ValueError(f"workspace must be a positive number of bytes, got {workspace!r}")
    return workspace


class Solved(NamedTuple):
    """What a pass returns.

    Args:
        eigenvalues: ``[L, S]`` float64, descending.
        grams: ``[L, S, S]``, or None where they were not kept.
    """

    eigenvalues: Tensor
    grams: Tensor | None


class Slots:
    """Which Gram in memory belongs to which unit: a place is given back when its unit is solved.

    A convolutional network has thousands of filters, of which only a layer's are under way at a
    time.

    Args:
        remaining: How many parameters own a part of each unit, ``[L]``.
        keep: Keep all Grams, each at its unit's place.
    """

    def __init__(self, remaining: npt.ArrayLike, keep: bool) -> None:
        self.remaining = np.array(remaining, dtype=np.int64)
        self.keep = keep
        self.place = np.full(len(self.remaining), -1, dtype=np.int64)
        self.count = len(self.remaining) if keep else 0
        self._free = np.zeros(0, dtype=bool)

    def take(self, units: npt.NDArray[np.int64]) -> Words:
        """Return the targets of a parameter that these units own, ``[n, 3]``, and count it.

        Raises:
            ValueError: If a unit has had all its parameters.
        """
        if (self.remaining[units] <= 0).any():
            unit = int(units[self.remaining[units] <= 0][0])
            raise ValueError(
                f"unit {unit} has had all of its parameters: count every parameter that owns a "
                "part of it in `remaining`, and add each once"
            )
        fresh = self.place[units] < 0
        self.place[units[fresh]] = units[fresh] if self.keep else self._allocate(int(fresh.sum()))
        self.remaining[units] -= 1
        done = self.remaining[units] == 0
        return np.stack([self.place[units], fresh, np.where(done, units, -1)], 1)

    def state(self, units: npt.NDArray[np.int64]) -> tuple[Words, Words]:
        """Return what :meth:`restore` needs to undo a :meth:`take`."""
        return self.place[units].copy(), self.remaining[units].copy()

    def restore(self, units: npt.NDArray[np.int64], before: tuple[Words, Words]) -> None:
        """Undo a :meth:`take`."""
        place, remaining = before
        taken = self.place[units[place < 0]]
        if not self.keep:
            self._free[taken] = True
        self.place[units], self.remaining[units] = place, remaining

    def release(self, units: npt.NDArray[np.int64]) -> None:
        """Give the places of the solved units among these back."""
        done = units[self.remaining[units] == 0]
        if not self.keep:
            self._free[self.place[done]] = True
            self.place[done] = -1

    def _allocate(self, wanted: int) -> npt.NDArray[np.int64]:
        missing = wanted - int(self._free.sum())
        if missing > 0:
            self._free = np.concatenate([self._free, np.ones(missing, dtype=bool)])
            self.count = len(self._free)
        # the lowest places, in order: neighbouring units are one batched product
        places = np.flatnonzero(self._free)[:wanted]
        self._free[places] = False
        return places


class Accumulator:
    """Takes parameters one by one, as a backward pass frees their tensors, in any order.

    Args:
        remaining: How many parameters own a part of each unit, ``[L]``.
        samples: S.
        device: Where the tensors are.
        dtype: Of the Grams: float32, or float64 for float64 models.
        precision: Of float32 products: ``"float32"``, ``"tf32"`` or ``"bf16"``.
        workspace: Bytes of gradients that are formed at a time; by default what a cache holds.
        keep_gram: Return all Grams, too.
        backend: ``"auto"``, ``"extension"`` or ``"eager"`` (the float64 reference).
    """

    def __init__(
        self,
        remaining: Sequence[int] | Words,
        samples: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        precision: str = "float32",
        workspace: int | None = None,
        keep_gram: bool = False,
        backend: str = "auto",
    ) -> None:
        self.samples, self.precision = samples, precision
        self.device = torch.device(device)
        self.workspace = check_workspace(workspace, device)
        self.fused = ops.use_extension(self.device, backend)
        self.slots = Slots(remaining, keep_gram)
        self.dtype = dtype if self.fused else torch.float64
        units = len(self.slots.remaining)
        kind = torch.device("cpu") if self.device.type == "mps" else self.device
        self.eigenvalues = torch.zeros(units, samples, dtype=torch.float64, device=kind)
        self.grams = torch.zeros(self.slots.count, samples, samples, dtype=self.dtype, device=kind)

    def add(self, factor: Factor, pieces: Words, way: str = "auto") -> None:
        """Add one parameter.

        Args:
            factor: Its per-sample gradients.
            pieces: Who owns what of them: rows ``(unit, r0, r1, c0, c1)`` sorted by unit, disjoint
                (:func:`~lightning_mat.mntk.words.piece_table`).
            way: ``"staged"``, ``"chip"``, ``"ghost"``, or ``"auto"`` for the one that is counted
                to be cheapest (:mod:`~lightning_mat.mntk.cost`).

        Raises:
            ValueError: If a tensor does not fit, or a unit has had all its parameters; nothing is
                added then.
        """
        units, owner = np.unique(pieces[:, 0], return_inverse=True)
        sources = factor.sources()
        before = self.slots.state(units)
        targets = self.slots.take(units)
        self._grow()
        local = np.concatenate([owner[:, None], pieces[:, 1:]], 1)
        try:
            self._add(factor, sources, targets, local, way)
        except ValueError:
            self.slots.restore(units, before)  # tensors that do not fit are found before all else
            raise
        self.slots.release(units)

    def _add(
        self,
        factor: Factor,
        sources: list[Source] | None,
        targets: Words,
        local: Words,
        way: str,
    ) -> None:
        if not self.fused:
            self._add_eagerly(factor, targets, local)
        elif sources is None:
            self._add_blocks(factor, targets, local)
        else:
            self._add_sources((factor.rows, factor.columns), sources, targets, local, way)

    def finish(self) -> Solved:
        """Return the eigenvalues; units of which parameters are missing are solved as they are."""
        units = np.flatnonzero((self.slots.place >= 0) & (self.slots.remaining > 0))
        if len(units):
            index = torch.from_numpy(units).to(self.grams.device)
            places = torch.from_numpy(self.slots.place[units]).to(self.grams.device)
            backend = "extension" if self.fused else "eager"
            solved = ops.gram_eigenvalues(self.grams[places], backend=backend)
            self.eigenvalues[index] = solved.to(self.eigenvalues)
        return Solved(self.eigenvalues, self.grams if self.slots.keep else None)

    def _grow(self) -> None:
        missing = self.slots.count - len(self.grams)
        if missing > 0:
            more = self.grams.new_empty(missing, self.samples, self.samples)
            self.grams = torch.cat([self.grams, more]) if len(self.grams) else more

    def _add_sources(
        self,
        shape: tuple[int, int],
        sources: list[Source],
        targets: Words,
        pieces: Words,
        way: str,
    ) -> None:
        words, a, b = fused_layer(
            shape,
            sources,
            targets,
            pieces,
            way,
            samples=self.samples,
            workspace=self.workspace,
            itemsize=self.dtype.itemsize,
        )
        self._run(a, b, words)

    def _run(self, a: list[Tensor], b: list[Tensor], words: Words) -> None:
        torch.ops.lightning_mat.mntk_accumulate_(
            self.grams, self.eigenvalues, a, b, plan_words([words]), self.precision, self.workspace
        )

    def _add_blocks(self, factor: Factor, targets: Words, pieces: Words) -> None:
        """Add a factor that only yields blocks: each is a layer, the last one completes."""
        fresh, last = targets.copy(), targets.copy()
        fresh[:, 2], last[:, 1] = -1, 0
        empty = np.zeros((0, 5), dtype=np.int64)
        shape = (factor.rows, factor.columns)
        self._run([], [], layer_words(shape, "staged", [], fresh, empty))
        waiting = last.copy()
        waiting[:, 2] = -1
        for top, bottom, inside in self._blocks(factor, pieces):
            block = factor.block(top, bottom).detach()
            words = layer_words(
                (bottom - top, factor.columns),
                "staged",
                [(0, Source("dense", None, block))],
                waiting,
                inside,
            )
            self._run([block.new_empty(0)], [block], words)
        self._run([], [], layer_words(shape, "staged", [], last, empty))

    def _add_eagerly(self, factor: Factor, targets: Words, pieces: Words) -> None:
        for slot, is_fresh, _ in targets.tolist():
            if is_fresh:
                self.grams[slot] = 0
        for top, bottom, inside in self._blocks(factor, pieces):
            block = factor.block(top, bottom).detach().to(self.grams)
            local = inside.copy()
            local[:, 0] = targets[inside[:, 0], 0]
            ops.gram_accumulate_reference(self.grams, block, torch.from_numpy(local))
        done = targets[targets[:, 2] >= 0]
        if len(done):
            solved = ops.gram_eigenvalues_reference(self.grams[done[:, 0]])
            self.eigenvalues[done[:, 2]] = solved

    def _blocks(self, factor: Factor, pieces: Words) -> list[tuple[int, int, Words]]:
        """Return blocks of owned rows that fit the workspace, with the pieces in each."""
        element = 8 if self.dtype == torch.float64 else 4
        limit = max(1, self.workspace // (factor.samples * max(factor.columns, 1) * element))
        blocks = []
        for start, stop in merge_runs((int(r0), int(r1)) for _, r0, r1, _, _ in pieces):
            for top in range(start, stop, limit):
                bottom = min(top + limit, stop)
                inside = pieces[(pieces[:, 1] < bottom) & (pieces[:, 2] > top)].copy()
                inside[:, 1] = np.maximum(inside[:, 1], top) - top
                inside[:, 2] = np.minimum(inside[:, 2], bottom) - top
                blocks.append((top, bottom, inside))
        return blocks


def fused_layer(
    shape: tuple[int, int],
    sources: list[Source],
    targets: Words,
    pieces: Words,
    way: str,
    *,
    samples: int,
    workspace: int,
    itemsize: int,
    first_index: int = 0,
) -> tuple[Words, list[Tensor], list[Tensor]]:
    """Return a layer's words and tensors for the fused operation.

    Args:
        shape: Rows and columns of its gradient.
        sources: What makes it.
        targets: Its targets, ``[n, 3]``.
        pieces: Who owns what, ``[m, 5]``, by target.
        way: As in :meth:`Accumulator.add`.
        samples: S.
        workspace: Bytes for intermediate results.
        itemsize: Bytes of a number in a Gram.
        first_index: The place of its first tensors in the operation's lists.
    """
    if sources and all(source.kind == "embedding" for source in sources):
        shape, sources, pieces = _rows_that_occur(shape, sources, pieces)
    swapped = False
    if all(source.kind == "linear" for source in sources) and _are_columns(shape, pieces):
        # Slabs of columns are slabs of rows of the transposed gradient, which are contiguous.
        swapped, shape = True, (shape[1], shape[0])
        pieces = pieces[:, [0, 3, 4, 1, 2]]
    ways = possible_ways(
        samples,
        shape,
        sources,
        pieces,
        workspace=workspace,
        itemsize=itemsize,
        on_gpu=bool(sources) and sources[0].b.is_cuda,
    )
    if way == "auto":
        way = choose_way(samples, shape, sources, pieces, ways)
    elif way not in ways:
        way = "staged"
    indexed = [(first_index + k, source) for k, source in enumerate(sources)]
    words = layer_words(shape, way, indexed, targets, pieces, swapped=swapped)
    b = [source.b.detach() for source in sources]
    a = [b[k].new_empty(0) if s.a is None else s.a.detach() for k, s in enumerate(sources)]
    return words, a, b


def _are_columns(shape: tuple[int, int], pieces: Words) -> bool:
    tall = bool(((pieces[:, 1] == 0) & (pieces[:, 2] == shape[0])).all())
    return tall and bool((pieces[:, 4] - pieces[:, 3] < shape[1]).any())


def _rows_that_occur(
    shape: tuple[int, int], sources: list[Source], pieces: Words
) -> tuple[tuple[int, int], list[Source], Words]:
    """Return an embedding over the rows that occur: the others add nothing to a Gram.

    Raises:
        ValueError: If the rows are not int64.
    """
    index = [source.a.contiguous() for source in sources if source.a is not None]
    if any(i.dtype != torch.int64 for i in index):
        raise ValueError(f"a must hold the int64 rows of an embedding, got type {index[0].dtype}")
    flat = torch.cat([i.flatten() for i in index])
    moved = pieces.copy()
    if flat.is_cuda and len(pieces) == 1 and tuple(pieces[0, 1:3]) == (0, shape[0]):
        # Which words occur stays on the device: as many rows as there are tokens hold them all.
        places = _ranks(flat)
        count = min(len(flat), shape[0])
        moved[:, 2] = count
    else:
        present = flat.unique()
        present = present[present >= 0]
        if len(present) and int(present[-1]) >= shape[0]:
            raise ValueError(
                f"an embedding of {shape[0]} rows was given row {int(present[-1])}: rows count "
                "from 0, and -1 stands for none"
            )
        bounds = torch.from_numpy(np.ascontiguousarray(pieces[:, 1:3])).to(present.device)
        moved[:, 1:3] = torch.searchsorted(present, bounds).cpu().numpy()
        places = torch.searchsorted(present, flat).masked_fill(flat < 0, -1)
        count = len(present)
    parts = places.split([i.numel() for i in index])
    compact = [
        replace(source, a=part.view(i.shape))
        for source, part, i in zip(sources, parts, index, strict=True)
    ]
    return (count, shape[1]), compact, moved


def _ranks(values: Tensor) -> Tensor:
    """Return each value's rank among the different ones that are not negative, else -1.

    Example:
        >>> _ranks(torch.tensor([7, 3, -1, 7])).tolist()
        [1, 0, -1, 1]
    """
    ordered, order = values.sort()
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    ranks = (first & (ordered >= 0)).cumsum(0) - 1
    return torch.empty_like(ranks).scatter_(0, order, ranks).masked_fill_(values < 0, -1)
