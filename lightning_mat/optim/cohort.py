"""Cohort: slabs of one parameter that train together and share a history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mat.optim import pieces
from lightning_mat.optim.pieces import View, chunk_of_pool, divide
from lightning_mat.optim.pool import Pool, Room
from lightning_mat.optim.slabs import Box, History, Slab, boxes_in, history_of, is_elementwise
from lightning_mat.shards import is_sharded, local_of
from lightning_mat.units.unit import Rect, matrix_shape


class Cohort:
    """Slabs that are stepped with one step count: large boxes in place, the others in a pool.

    Of a sharded parameter they are the slabs' rows on this rank. One without any is stepped as a
    piece without elements, so that its step count is the same on all ranks.

    Args:
        param: The parameter.
        slabs: All slabs of the parameter.
        members: Indices of the slabs in the cohort.
        history: What their state has in common.
        state: The parameter's optimizer state, read only.
        fused: See :func:`~lightning_mat.optim.pieces.divide`.
        in_place: Whether small boxes, too, are stepped in place.

    Attributes:
        pieces: The large boxes.
        boxes: What is for a pool.
        pools: The pools; none before they are made, or if the parameter has no gradient.
    """

    def __init__(
        self,
        param: Tensor,
        slabs: Sequence[Slab],
        members: list[int],
        history: History,
        state: dict[str, Any],
        *,
        fused: bool,
        in_place: bool = False,
    ) -> None:
        """Divide the boxes, and find the state of the large ones."""
        scalars = dict(history)
        known = {key: value for key, value in state.items() if key in scalars}
        elementwise = [
            local_of(value) for value in known.values() if is_elementwise(value, param.shape)
        ]
        boxes = boxes_in(param, [rect for i in members for rect in slabs[i].rects])
        values = local_of(param).detach()
        self.param = param
        self.members = members
        below = 0 if in_place else pieces.PACK_BELOW
        if fused:
            below = min(below, pieces.FUSED_PACK_BELOW)
        self.pieces, self.boxes = divide(boxes, [values, *elementwise], below=below, fused=fused)
        if is_sharded(param) and not boxes:
            self.pieces = [View((slice(0, 0),), values)]
        self.pools: list[Pool] = []
        self._history = history
        for piece in self.pieces:
            for key, value in known.items():
                if is_elementwise(value, param.shape):
                    piece.state[key] = local_of(value)[piece.box]
                elif isinstance(value, Tensor):
                    piece.state[key] = torch.full_like(value, scalars[key])
                else:
                    piece.state[key] = type(value)(scalars[key])

    @property
    def history(self) -> History:
        """What the state of the slabs has in common now."""
        if self.pieces:
            return history_of(self.pieces[0].state, self.pieces[0].shape)
        return self.pools[0].history if self.pools else self._history

    def settle(self, state: dict[str, Any]) -> None:
        """Write the pieces' state into the parameter's; scalars only where there is none yet."""
        for piece in self.pieces:
            for key, value in piece.state.items():
                if is_elementwise(value, piece.shape):
                    if state.get(key) is None:
                        state[key] = torch.zeros_like(
                            self.param, dtype=value.dtype, device=value.device
                        )
                    piece.put(local_of(state[key]), value)
                elif value is not None:
                    state.setdefault(key, value)


def pools_of(
    cohorts: Sequence[Cohort],
    states: Mapping[Tensor, dict[str, Any]],
    *,
    share_room: bool,
    fused: bool,
) -> list[Pool]:
    """Pool what cohorts of one parameter group have for it, and return the pools.

    Args:
        cohorts: The cohorts.
        states: Of the parameters, read only.
        share_room: Whether the pools can be stepped one after the other; little ones are not: their
            groups would cost calls.
        fused: Whether the optimizer's kernel is fused.
    """
    alike: dict[tuple[object, ...], list[Cohort]] = {}
    for cohort in cohorts:
        if cohort.boxes:
            key = (cohort.history, cohort.param.dtype, cohort.param.device)
            alike.setdefault(key, []).append(cohort)
    pools: list[Pool] = []
    chunks = [
        (together, parts)
        for together in alike.values()
        for parts in _in_chunks(together, chunk_of_pool(together[0].param, fused=fused))
    ]
    room = None
    if share_room and chunks:
        sizes = [_numel(parts) for _, parts in chunks]
        if sum(sizes) > chunk_of_pool(chunks[0][0][0].param, fused=fused):
            room = Room(Pool.room_for(max(sizes)))
    for together, parts in chunks:
        known = [states.get(cohort.param, {}) for cohort, _ in parts]
        members = [(cohort.param, boxes) for cohort, boxes in parts]
        pools.append(Pool(members, together[0].history, known, room))
        for cohort, _ in parts:
            cohort.pools.append(pools[-1])
    return pools


def _numel(parts: Sequence[tuple[Cohort, Sequence[Box]]]) -> int:
    return sum(local_of(cohort.param)[box].numel() for cohort, boxes in parts for box in boxes)


def _in_chunks(cohorts: Sequence[Cohort], chunk: int) -> list[list[tuple[Cohort, list[Box]]]]:
    """Divide what cohorts have for a pool into chunks."""
    chunks: list[list[tuple[Cohort, list[Box]]]] = []
    room = 0
    for cohort in cohorts:
        values = local_of(cohort.param).detach()
        for box in cohort.boxes:
            for part in pieces.cut(box, values, chunk):
                numel = values[part].numel()
                if not chunks or numel > room:
                    chunks.append([])
                    room = chunk
                if not chunks[-1] or chunks[-1][-1][0] is not cohort:
                    chunks[-1].append((cohort, []))
                chunks[-1][-1][1].append(part)
                room -= numel
    return chunks


def whole_in_chunks(param: Tensor, state: dict[str, Any], *, fused: bool = False) -> Cohort | None:
    """Return a large parameter that trains whole as a cohort of chunks; None for a smaller one.

    See :func:`~lightning_mat.optim.pieces.chunk_of` for what that saves. Sharded parameters are
    one of any size: optimizers do not step them beside ordinary tensors.
    """
    small = type(param.data) is not Tensor or param.numel() < 2 * pieces.chunk_of(param)
    if small and not is_sharded(param):
        return None
    height, width = matrix_shape(param.shape)
    slab = Slab(None, (Rect(0, height, 0, width),))
    return Cohort(
        param, [slab], [0], history_of(state, param.shape), state, fused=fused, in_place=True
    )


def settle_scalars(shape: torch.Size, state: dict[str, Any], history: History) -> None:
    """Give the state of a parameter of the given shape the scalars of a history."""
    for key, number in history:
        value = state[key]
        if not isinstance(value, Tensor):
            state[key] = type(value)(number)
        elif not is_elementwise(value, shape):
            value.fill_(number)
