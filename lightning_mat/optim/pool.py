"""Pool: small pieces of many parameters, copied side by side and stepped as one flat tensor."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mat.optim.pieces import Piece, is_dense
from lightning_mat.optim.slabs import Box, History, history_of, is_elementwise

# From so many runs of rows on, one gather by row numbers is cheaper than a copy of each run.
MANY_RUNS = 3


class Member:
    """The boxes of one parameter that are in a pool, and where they lie in its flat tensors.

    What the boxes are read from or written to (the parameter, a gradient, a state) must be laid out
    like the parameter; :class:`Pool` sees to that.

    Args:
        param: The parameter.
        boxes: Boxes of it.
        start: Where in the flat tensors the first box begins.
    """

    def __init__(self, param: Tensor, boxes: Sequence[Box], start: int) -> None:
        """Count the elements, and find the memory of the boxes."""
        values = param.detach()
        self.param = param
        self.start = start
        self.rows: Tensor | None = None
        self._boxes: list[tuple[torch.Size, tuple[int, ...], int, bool]] = []
        if _rows_are_dense(values) and len(boxes) >= MANY_RUNS and all(len(b) == 1 for b in boxes):
            rows = torch.cat([torch.arange(box[0].start, box[0].stop) for box in boxes])
            self.rows = rows.to(param.device)
            self._width = values.numel() // len(values)
            self.numel = len(rows) * self._width
            return
        for box in boxes:
            view = values[box]
            offset = int(view.storage_offset() - values.storage_offset())
            self._boxes.append((view.shape, view.stride(), offset, is_dense(view)))
        self.numel = sum(shape.numel() for shape, *_ in self._boxes)

    @property
    def gradient(self) -> Tensor:
        """The parameter's gradient, which is there: others are not pooled."""
        if self.param.grad is None:
            raise RuntimeError("a parameter without a gradient is in a pool")
        return self.param.grad

    def laid_out(self, full: Tensor, flat: Tensor) -> Tensor:
        """Return a tensor in the layout of the parameter and the dtype of a flat one."""
        if full.stride() == self.param.stride() and full.dtype == flat.dtype:
            return full
        return torch.empty_like(self.param, dtype=flat.dtype, requires_grad=False).copy_(full)

    def inside(self, full: Tensor) -> list[Tensor]:
        """Return the boxes as views of a tensor that is laid out like the parameter.

        Returns:
            One view per box, or, for row numbers, the tensor as a matrix.
        """
        offset = full.storage_offset()
        if self.rows is not None:
            return [full.as_strided((len(full), self._width), (self._width, 1), offset)]
        return [full.as_strided(shape, s, offset + first) for shape, s, first, _ in self._boxes]

    def slots(self, flat: Tensor) -> list[Tensor]:
        """Return their places in a flat tensor, in the shapes of :meth:`inside`."""
        if self.rows is not None:
            return [flat[self.start : self.start + self.numel].view(len(self.rows), self._width)]
        slots, start = [], self.start
        for shape, stride, _, dense in self._boxes:
            stop = start + shape.numel()
            # A dense box keeps the order of its memory: the copy is a straight one.
            slots.append(
                flat.as_strided(shape, stride, flat.storage_offset() + start)
                if dense
                else flat[start:stop].view(shape)
            )
            start = stop
        return slots


class Room:
    """Memory for values and gradients of the pools that are stepped one after the other.

    Args:
        numel: Elements of the largest of the pools.
    """

    def __init__(self, numel: int) -> None:
        """Start without memory."""
        self._numel = numel
        self._pair: tuple[Tensor, Tensor] | None = None

    def of(self, numel: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return two flat tensors; all pools of one dtype get the same memory.

        Args:
            numel: Elements of each.
            like: Has their dtype and device.
        """
        if self._pair is None or self._pair[0].dtype != like.dtype:
            self._pair = like.new_empty(self._numel), like.new_empty(self._numel)
        values, grads = self._pair
        return values[:numel], grads[:numel]


class Pool:
    """Small pieces of all parameters of a group with the same history, as one flat tensor.

    A piece that is stepped on its own costs some fifteen calls whatever its size; in a pool it
    costs three copies: values and gradient there, values back. State stays in the pool between
    steps.

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
        self.members: list[Member] = []
        self._numel = 0
        for param, boxes in parts:
            self.members.append(Member(param, boxes, self._numel))
            self._numel += self.members[-1].numel
        self.piece = Piece(torch.Size((self._numel,)))
        self.shares_room = room is not None
        self._room = Room(self._numel) if room is None else room
        self._like = parts[0][0].detach()
        self._flat: tuple[_Flat, _Flat] | None = None
        self._params: list[Tensor | None] = [None] * len(parts)
        self._inside: list[list[Tensor]] = [[] for _ in parts]
        for key, number in history:
            self.piece.state[key] = self._state(number, [state[key] for state in states])

    @property
    def history(self) -> History:
        """What the state of all boxes has in common now."""
        return history_of(self.piece.state, self.piece.shape)

    def tensor(self) -> Tensor:
        """Return the tensor to be stepped, with a gradient; :meth:`load` fills both."""
        if self._flat is None:
            values, grads = self._room.of(self._numel, self._like)
            values.grad = grads
            self._flat = _Flat(values, self.members), _Flat(grads, self.members)
        return self._flat[0].tensor

    @torch.no_grad()
    def load(self) -> None:
        """Copy values and gradients."""
        self.tensor()
        if self._flat is None:
            raise RuntimeError("tensor() makes the flat tensors")
        values, grads = self._flat
        for index, member in enumerate(self.members):
            now, known = member.param.detach(), self._params[index]
            if known is None or known.data_ptr() != now.data_ptr():  # it may get new memory
                self._params[index], self._inside[index] = now, member.inside(now)
        values.copy_from(self._inside)
        grads.copy_from([m.inside(m.laid_out(m.gradient, grads.tensor)) for m in self.members])

    @torch.no_grad()
    def unload(self) -> None:
        """Copy the values back."""
        if self._flat is None:
            return
        self._flat[0].copy_to(self._inside)
        if self._like.device.type != "cpu":  # torch keeps freed memory at hand there
            self._flat, self._room = None, Room(self._numel)

    def settle(self, states: Sequence[MutableMapping[str, Any]]) -> None:
        """Write the state of the boxes into the parameters'; scalars only where there is none."""
        for key, value in self.piece.state.items():
            if is_elementwise(value, self.piece.shape):
                for member, state in zip(self.members, states, strict=True):
                    if state.get(key) is None:
                        state[key] = torch.zeros_like(member.param, dtype=value.dtype)
                flat = _Flat(value, self.members)
                fulls = [state[key] for state in states]
                laid = [m.laid_out(f, value) for m, f in zip(self.members, fulls, strict=True)]
                flat.copy_to([m.inside(full) for m, full in zip(self.members, laid, strict=True)])
                for full, other in zip(fulls, laid, strict=True):
                    if full is not other:
                        full.copy_(other)
            elif value is not None:
                for state in states:
                    if key not in state:  # of its own: optimizers count in place
                        state[key] = value.clone() if isinstance(value, Tensor) else value

    def _state(self, number: float, fulls: Sequence[Any]) -> Any:
        """Return what the parameters have under one key of the state, pooled."""
        if is_elementwise(fulls[0], self.members[0].param.shape):
            tensor = self._like.new_empty(self._numel, dtype=fulls[0].dtype)
            laid = [m.laid_out(f, tensor) for m, f in zip(self.members, fulls, strict=True)]
            flat = _Flat(tensor, self.members)
            flat.copy_from([m.inside(full) for m, full in zip(self.members, laid, strict=True)])
            return tensor
        return (
            torch.full_like(fulls[0], number)
            if isinstance(fulls[0], Tensor)
            else type(fulls[0])(number)
        )


class _Flat:
    """A flat tensor, and the places of a pool's members in it."""

    def __init__(self, tensor: Tensor, members: Sequence[Member]) -> None:
        self.tensor = tensor
        self._members = members
        self._slots = [member.slots(tensor) for member in members]
        # Boxes of all members are one call's business.
        self._boxes = [
            slot
            for member, slots in zip(members, self._slots, strict=True)
            if member.rows is None
            for slot in slots
        ]

    def copy_from(self, inside: Sequence[Sequence[Tensor]]) -> None:
        """Read what :meth:`Member.inside` returned for each member."""
        for member, slots, views in zip(self._members, self._slots, inside, strict=True):
            if member.rows is not None:
                torch.index_select(views[0], 0, member.rows, out=slots[0])
        if self._boxes:
            torch._foreach_copy_(self._boxes, self._views_of_boxes(inside))

    def copy_to(self, inside: Sequence[Sequence[Tensor]]) -> None:
        """Write there."""
        for member, slots, views in zip(self._members, self._slots, inside, strict=True):
            if member.rows is not None:
                _copy_rows(views[0], member.rows, slots[0])
        if self._boxes:
            torch._foreach_copy_(self._views_of_boxes(inside), self._boxes)

    def _views_of_boxes(self, inside: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        return [
            view
            for member, views in zip(self._members, inside, strict=True)
            if member.rows is None
            for view in views
        ]


def _rows_are_dense(tensor: Tensor) -> bool:
    """Return whether each row fills a stretch of memory, one after the other."""
    return is_dense(tensor) and tensor.stride(0) * len(tensor) == tensor.numel()


def _copy_rows(full: Tensor, rows: Tensor, part: Tensor) -> None:
    """Write ``part`` to some rows of a contiguous matrix.

    On the CPU ``index_copy_`` copies number by number, at the same pace whatever their width: rows
    of so many bytes are taken as words of 16.
    """
    word = 16 // full.element_size()
    starts = (full.storage_offset(), part.storage_offset())
    if full.device.type == "cpu" and not any(n % word for n in (full.shape[1], *starts)):
        full, part = full.view(torch.complex128), part.view(torch.complex128)
    full.index_copy_(0, rows, part)
