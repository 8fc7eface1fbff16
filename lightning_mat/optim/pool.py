"""Pool: small pieces of many parameters, copied side by side and stepped as one flat tensor."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mat.optim.boxes import gather_boxes, runs_of, scatter_boxes
from lightning_mat.optim.pieces import Piece
from lightning_mat.optim.slabs import Box, History, history_of, is_elementwise
from lightning_mat.shards import local_of

ALIGNED = 16  # Elements: gradients begin at a line of the cache, as values do.


class Room:
    """Memory for values and gradients of the pools that are stepped one after the other.

    Args:
        numel: Elements of the largest of the pools.
    """

    def __init__(self, numel: int) -> None:
        """Start without memory."""
        self._numel = numel
        self._memory: Tensor | None = None

    def of(self, numel: int, like: Tensor) -> Tensor:
        """Return a flat tensor; all pools of one dtype get the same memory.

        Args:
            numel: Its elements.
            like: Has its dtype and device.
        """
        if self._memory is None or self._memory.dtype != like.dtype:
            self._memory = like.new_empty(self._numel)
        return self._memory[:numel]


class Pool:
    """Small pieces of all parameters of a group with the same history, as one flat tensor.

    A piece that is stepped on its own costs some fifteen calls whatever its size; all pieces of a
    pool together cost three copies: values and gradients there, values back. State stays in the
    pool between steps.

    Args:
        parts: Parameters, all of one dtype and device, with the boxes to pool.
        history: What the state of all boxes has in common.
        states: Of the parameters, read only.
        room: Memory that other pools may use, too; None for memory of its own.
    """

    def __init__(
        self,
        parts: Sequence[tuple[Tensor, Sequence[Box]]],
        history: History,
        states: Sequence[MutableMapping[str, Any]],
        room: Room | None,
    ) -> None:
        """Lay the boxes out, and copy their state."""
        self.params = [param for param, _ in parts]
        table: list[tuple[int, ...]] = []
        numel = 0
        for index, (param, boxes) in enumerate(parts):
            for box in boxes:
                for offset, stride, rows, run in runs_of(local_of(param).detach(), box):
                    table.append((index, offset, stride, rows, run, numel))
                    numel += rows * run
        self._boxes = torch.tensor(table, dtype=torch.int64).view(-1, 6)
        # Gradients are gathered after the values, by the same call.
        self._grads_at = Pool.room_for(numel) - numel
        of_grads = torch.tensor([len(parts), 0, 0, 0, 0, self._grads_at])
        # Threads divide a table evenly, and a tensor too: each copies what it will compute with, or
        # it would come from another core's cache.
        threads = torch.get_num_threads()
        thread = (self._boxes[:, 5] * threads).div(max(numel, 1), rounding_mode="floor")
        order = torch.cat([thread, thread]).argsort(stable=True)
        self._boxes_of_both = torch.cat([self._boxes, self._boxes + of_grads])[order]
        self.piece = Piece(torch.Size((numel,)))
        self.shares_room = room is not None
        self._room = Room(Pool.room_for(numel)) if room is None else room
        self._flat: tuple[Tensor, Tensor] | None = None
        for key, number in history:
            self.piece.state[key] = self._state(number, [state[key] for state in states])

    @property
    def history(self) -> History:
        """What the state of all boxes has in common now."""
        return history_of(self.piece.state, self.piece.shape)

    @staticmethod
    def room_for(numel: int) -> int:
        """Return how many elements of memory a pool needs for its values and gradients."""
        return numel + -(-numel // ALIGNED) * ALIGNED

    def tensor(self) -> Tensor:
        """Return the tensor to be stepped, with a gradient; :meth:`load` fills both."""
        if self._flat is None:
            numel = self.piece.shape.numel()
            both = self._room.of(self._grads_at + numel, self._values()[0])
            self._flat = both, both[:numel]
            self._flat[1].grad = both[self._grads_at :]
        return self._flat[1]

    @torch.no_grad()
    def load(self) -> None:
        """Copy values and gradients."""
        self.tensor()
        if self._flat is None:
            raise RuntimeError("tensor() makes the flat tensors")
        grads = self._laid_out([param.grad for param in self.params], self._flat[0])
        gather_boxes([*self._values(), *grads], self._boxes_of_both, self._flat[0])

    @torch.no_grad()
    def unload(self) -> None:
        """Copy the values back."""
        if self._flat is None:
            return
        both, values = self._flat
        scatter_boxes(values, self._boxes, self._values())
        if both.device.type != "cpu":  # torch keeps freed memory at hand there
            self._flat, self._room = None, Room(len(both))

    def settle(self, states: Sequence[MutableMapping[str, Any]]) -> None:
        """Write the state of the boxes into the parameters'; scalars only where there is none."""
        for key, value in self.piece.state.items():
            if is_elementwise(value, self.piece.shape):
                for param, state in zip(self.params, states, strict=True):
                    if state.get(key) is None:
                        state[key] = torch.zeros_like(param, dtype=value.dtype)
                fulls = [state[key] for state in states]
                laid = self._laid_out(fulls, value)
                scatter_boxes(value, self._boxes, laid)
                for full, other in zip(map(local_of, fulls), laid, strict=True):
                    if full is not other:
                        full.copy_(other)
            elif value is not None:
                for state in states:
                    if key not in state:  # of its own: optimizers count in place
                        state[key] = value.clone() if isinstance(value, Tensor) else value

    def _state(self, number: float, fulls: Sequence[Any]) -> Any:
        """Return what the parameters have under one key of the state, pooled."""
        if is_elementwise(fulls[0], self.params[0].shape):
            flat = local_of(fulls[0]).new_empty(self.piece.shape)
            gather_boxes(self._laid_out(fulls, flat), self._boxes, flat)
            return flat
        return (
            torch.full_like(fulls[0], number)
            if isinstance(fulls[0], Tensor)
            else type(fulls[0])(number)
        )

    def _values(self) -> list[Tensor]:
        # Each time: a parameter may get new memory. They share its version counter.
        return [local_of(param).detach() for param in self.params]

    def _laid_out(self, fulls: Sequence[Tensor | None], flat: Tensor) -> list[Tensor]:
        """Return tensors in the layouts of the parameters and the dtype of a flat one."""
        laid = []
        for param, given in zip(self.params, fulls, strict=True):
            if given is None:
                raise RuntimeError("a parameter without a gradient is in a pool")
            values, full = local_of(param), local_of(given)
            if full.stride() != values.stride() or full.dtype != flat.dtype:
                own = flat.new_empty_strided(values.shape, values.stride())
                full = own.copy_(full)
            laid.append(full)
        return laid
