"""The gate's net: hooks on parameters that hold the promise whoever computed the gradient.

A rule computes only what trains, and then these hooks find nothing to do. Where no rule knows the
layer, or where a model uses a parameter outside of its module (``F.linear(x, self.fc.weight)``),
autograd computes the gradient in full and the hook clears what rests: right, but nothing is saved.
With ``skip="units"`` the second would be wrong, because gradients also travel through what rests on
to what lies below: where none of the layers that read the parameter has run, the hooks refuse it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_mat.gate.buffer import GradientBuffer, fresh
from lightning_mat.gate.compiled import Place
from lightning_mat.gate.selection import Selection
from lightning_mat.units.regions import Block, complement

_log = logging.getLogger(__name__)
_noted: set[str] = set()


def note_once(key: str, message: str) -> None:
    """Log a message at info level the first time that its key is seen in this process."""
    if key not in _noted:
        _noted.add(key)
        _log.info(message)


def _check_read(name: str, readers: Sequence[Place]) -> None:
    """Raise where a gradient came of no layer that cuts what travels through what rests."""
    if readers and not any(place.ran for place in readers):
        raise RuntimeError(
            f"parameter {name!r} is used outside of its module's forward (as in F.linear(x, "
            'layer.weight)), where skip="units" cannot cut the gradients through units at rest: '
            'call the layer itself, use skip="weights", or leave the parameter out of the units'
        )


class ClearResting:
    """Hook on a parameter of which a part rests: zeros there, in whatever gradient arrives.

    Args:
        name: The parameter's name, for messages.
        blocks: What trains.
        rows: Rows of the parameter's matrix view.
        columns: Columns of it.
        readers: Of the layers one of which has to have run; none for no such demand.
        keep: Whether to keep the memory of its gradient between steps.
    """

    def __init__(
        self,
        name: str,
        blocks: Sequence[Block],
        rows: int,
        columns: int,
        readers: Sequence[Place] = (),
        *,
        keep: bool = True,
    ) -> None:
        """Find out what rests."""
        self.name = name
        self.readers = readers
        self.shape = (rows, columns)
        self.resting = complement([r for block in blocks for r in block.rects()], rows, columns)
        # It knows nothing of this hook: a cycle would keep its memory until somebody collects it.
        self._clear = Clear(self.shape, self.resting)
        self.buffer = GradientBuffer(self._clear, keep=keep)
        self._clean: tuple[int, int] | None = None
        self._owned = False

    def deliver(self, grad: Tensor) -> Tensor:
        """Return ``grad``, remembered as one in which what rests is zero already."""
        self.buffer.written(grad)
        # Compiled code has no addresses to remember: there the hook clears once more.
        if not torch.compiler.is_compiling():
            self._clean = (grad.data_ptr(), grad._version)
            self._owned = fresh()
        return grad

    def __call__(self, grad: Tensor | None) -> Tensor | None:
        """Return the gradient with zeros where the parameter rests, None if it is so already."""
        if grad is None:  # autograd visits parameters without a gradient, too
            return None
        if grad.layout is not torch.strided:
            raise TypeError(
                f"the gradient of {self.name!r} is {grad.layout}, of which a part cannot rest: "
                "let the parameter train or rest whole, or use dense gradients (sparse=False)"
            )
        # Autograd sums gradients in place, which raises the version, or into another tensor:
        # address and version together say that this is what a rule delivered and nothing else.
        clean, self._clean = self._clean, None
        if clean == (grad.data_ptr(), grad._version):
            if not self._owned:
                return None
            # What was delivered to compiled code is its own memory, in which it may have added up
            # other gradients of the parameter, without a version that tells.
            if grad.is_contiguous():
                self._clear(grad)
                return None
        _check_read(self.name, self.readers)
        cleared = grad.clone(memory_format=torch.contiguous_format)
        self._clear(cleared)
        return cleared


class Clear:
    """Writes zeros to what rests of a parameter's gradient.

    Args:
        shape: Rows and columns of the parameter's matrix view.
        resting: What rests.
    """

    def __init__(self, shape: tuple[int, int], resting: Sequence[Block]) -> None:
        """Remember the blocks."""
        self._shape, self._resting = shape, resting
        self._sides: dict[str, list[tuple[Selection, Selection]]] = {}

    def __call__(self, grad: Tensor) -> None:
        """Write the zeros; everywhere, if the gradient is laid out otherwise than the parameter."""
        if grad.shape[:1] != self._shape[:1] or not grad.is_contiguous():
            grad.zero_()  # what trains is written anyway
            return
        matrix = grad.view(self._shape)
        for rows, columns in self._on(grad.device):
            if columns.whole:
                rows.clear(matrix, 0)
            else:
                for a, b in rows.runs:
                    columns.clear(matrix.narrow(0, a, b - a), 1)

    def _on(self, device: torch.device) -> list[tuple[Selection, Selection]]:
        """Return rows and columns of the blocks, which accelerators take by index."""
        if device.type not in self._sides:
            self._sides[device.type] = [
                (
                    Selection(block.rows, self._shape[0], device),
                    Selection(block.columns, self._shape[1], device),
                )
                for block in self._resting
            ]
        return self._sides[device.type]


class DropGradient:
    """Hook on a parameter that rests whole: no gradient, so that no optimizer moves it.

    Args:
        name: The parameter's name, for messages.
        readers: As those of :class:`ClearResting`.
    """

    def __init__(self, name: str, readers: Sequence[Place] = ()) -> None:
        """Remember the name."""
        self.name = name
        self.readers = readers

    def __call__(self, param: Tensor) -> None:
        """Drop the gradient that was just accumulated, if any: autograd may come without one."""
        if param.grad is None:
            return
        param.grad = None
        _check_read(self.name, self.readers)
        note_once(
            f"used outside: {self.name}",
            f"parameter {self.name!r} rests, but a gradient arrived and was dropped: zeros in a "
            "compiled model; in any other it was computed in full, because the model uses the "
            "parameter outside of its module's forward, and nothing was saved",
        )


def watch(param: nn.Parameter, hook: ClearResting | DropGradient) -> RemovableHandle:
    """Register a hook and return its handle."""
    if isinstance(hook, ClearResting):
        return cast(RemovableHandle, param.register_hook(hook))
    handle = param.register_post_accumulate_grad_hook(hook)
    return cast(RemovableHandle, handle)


def forget(param: nn.Parameter) -> None:
    """Undo the empty dictionaries that PyTorch leaves behind when a parameter's hooks are gone."""
    for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        if not getattr(param, hooks):
            setattr(param, hooks, None)
