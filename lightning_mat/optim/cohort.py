"""Cohort: slabs of one parameter that train together and share a history."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mat.optim.pieces import pieces_of
from lightning_mat.optim.slabs import History, Slab, boxes_of, history_of, is_elementwise


class Cohort:
    """Slabs that are stepped with one step count, as few pieces.

    Args:
        param: The parameter.
        slabs: All slabs of the parameter.
        members: Indices of the slabs in the cohort.
        history: What their state has in common.
        state: The parameter's optimizer state, read only.
        list_kernels: See :func:`~lightning_mat.optim.pieces.pieces_of`.
    """

    def __init__(
        self,
        param: Tensor,
        slabs: Sequence[Slab],
        members: list[int],
        history: History,
        state: dict[str, Any],
        *,
        list_kernels: bool,
    ) -> None:
        """Cut the pieces and their state."""
        scalars = dict(history)
        known = {key: value for key, value in state.items() if key in scalars}
        elementwise = [value for value in known.values() if is_elementwise(value, param.shape)]
        boxes = boxes_of([rect for i in members for rect in slabs[i].rects], param.shape)
        self.members = members
        self.pieces = pieces_of(boxes, [param.detach(), *elementwise], list_kernels=list_kernels)
        for piece in self.pieces:
            for key, value in known.items():
                if is_elementwise(value, param.shape):
                    piece.state[key] = piece.take(value)
                elif isinstance(value, Tensor):
                    piece.state[key] = torch.full_like(value, scalars[key])
                else:
                    piece.state[key] = type(value)(scalars[key])

    @property
    def history(self) -> History:
        """What the state of the slabs has in common now."""
        first = self.pieces[0]
        return history_of(first.state, first.shape)

    def settle(self, param: Tensor, state: dict[str, Any]) -> None:
        """Write the pieces' state into the parameter's; scalars only where there is none yet."""
        for piece in self.pieces:
            for key, value in piece.state.items():
                if is_elementwise(value, piece.shape):
                    if state.get(key) is None:
                        state[key] = torch.zeros_like(param, dtype=value.dtype, device=value.device)
                    piece.put(state[key], value)
                elif value is not None:
                    state.setdefault(key, value)


def settle_scalars(shape: torch.Size, state: dict[str, Any], history: History) -> None:
    """Give the state of a parameter of the given shape the scalars of a history."""
    for key, number in history:
        value = state[key]
        if not isinstance(value, Tensor):
            state[key] = type(value)(number)
        elif not is_elementwise(value, shape):
            value.fill_(number)
