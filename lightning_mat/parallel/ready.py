"""Ready: DDP waits for every parameter's gradient; this tells it which will not come.

DDP reduces a bucket once each of its parameters has had its gradient accumulated, and a parameter
that rests whole is in no graph. ``find_unused_parameters=True`` would find that out by walking the
graph in every step. But a decision says it before: one node on the loss, whose backward hands
nothing (not even zeros) to those parameters, makes autograd visit them, and DDP fills their places
with zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn.parallel import DistributedDataParallel

from lightning_mat.gate.fallback import forget
from lightning_mat.parallel.order import note_order, repeat_order

if TYPE_CHECKING:
    from lightning_mat.engine import MAT


class _Nothing(torch.autograd.Function):
    """The identity on a loss, in place, with an undefined gradient for every other input."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *params: Tensor) -> Tensor:
        """Return the loss itself."""
        ctx.mark_dirty(loss)
        ctx.count = len(params)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Pass the loss' gradient on."""
        return (*grads, *[None] * ctx.count)


def hand_nothing(loss: Tensor, params: list[nn.Parameter]) -> None:
    """Make the backward pass from a loss visit some parameters without a gradient for them.

    In place: whoever holds the loss calls its ``backward``. Its value and its version stay.

    Raises:
        RuntimeError: If the loss is one of several views of one tensor, as ``unbind`` makes them.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> visits = []
        >>> handle = weight.register_hook(visits.append)
        >>> loss = torch.ones(1, requires_grad=True).sum()
        >>> hand_nothing(loss, [weight])
        >>> loss.backward()
        >>> weight.grad, visits
        (None, [None])
    """
    try:
        # A product may have saved the loss for its own backward pass: nothing in it changes.
        with _unsafe_preserve_version_counter(loss):
            _Nothing.apply(loss, *params)
    except RuntimeError as error:
        raise RuntimeError(
            f"the loss cannot be marked for DDP ({error}): if it is one of several views of one "
            "tensor, as unbind and split make them, pass loss.clone() to the backward pass"
        ) from error


class Ready:
    """Completes DDP's backward passes while units rest; one per fit.

    With ``skip="units"`` also a parameter that trains may get no gradient: the norm in front of an
    attention layer all of whose heads rest. In the first backward pass after a decision every
    parameter is visited, and the ranks agree on which got none. Those are visited in every pass
    until the next decision, and the ranks tell each other whether a gradient came after all, as to
    an expert that was idle in the first batch: it is kept then. Where none came, ``.grad`` is None,
    as without DDP.

    Args:
        ddp: What wraps the model.
        mat: The engine that decides.
        order: In which order the first pass came to the parameters, by their names; filled in that
            pass if it is empty. Save it: with that of the run that is resumed, before its first
            forward pass, DDP makes the same buckets, so that more than two ranks add their
            gradients in the same order. Collective then.
    """

    def __init__(
        self, ddp: DistributedDataParallel, mat: MAT, order: list[str] | None = None
    ) -> None:
        self.ddp, self.mat = ddp, mat
        self.order = [] if order is None else order
        self._params = {
            name: param
            for name, param in mat.model.named_parameters()
            if param.requires_grad and name not in ddp.parameters_to_ignore
        }
        self._active: Tensor | None = None
        self._resting: list[nn.Parameter] = []
        # Of the parameters that train, those without a gradient in the first pass.
        self._idle: dict[str, nn.Parameter] = {}
        self._known = True
        self._came: dict[str, bool] = {}
        self._kept: dict[str, bool] = {}
        self._hooks: list[Callable[[], None]] = []
        self._ordered: Callable[[], None] | None = None
        if self.order and not repeat_order(ddp, self._params, self.order):
            self.order.clear()

    def before_backward(self, loss: Tensor) -> None:
        """Mark the loss; to be called right before its backward pass."""
        if self._active is None or not torch.equal(self._active, self.mat.active):
            self._follow(self.mat.active)
        # DDP walks the graph itself, or does not wait for anything in this pass.
        if self.ddp.find_unused_parameters or not self.ddp.require_backward_grad_sync:
            return
        if not self.order:
            self._end_order()  # of a pass that failed
            self._ordered = note_order(self._params, self.order)
        watched = self._idle if self._known else self._params
        if watched:
            self._watch(watched)
        # Before the ranks know more, all are watched, what rests among them.
        nothing = [*watched.values(), *(self._resting if self._known else ())]
        if nothing:
            hand_nothing(loss, nothing)

    def after_backward(self) -> None:
        """Drop DDP's zeros where there was no gradient; to be called after the backward pass.

        Raises:
            RuntimeError: If, in the first pass after a decision, a parameter got a gradient on
                some of the ranks only.
        """
        self._end_order()
        if self._hooks:
            self._agree()
        for param in self._resting:
            param.grad = None

    def close(self) -> None:
        """Leave nothing on the parameters."""
        self._end_order()
        self._unwatch()

    def _end_order(self) -> None:
        if self._ordered is not None:
            self._ordered()
            self._ordered = None

    def _unwatch(self) -> None:
        for remove in self._hooks:
            remove()
        self._hooks.clear()

    def _follow(self, active: Tensor) -> None:
        self._unwatch()
        part = self.mat.part
        self._active, self._idle = active.clone(), {}
        self._resting = [
            param
            for name, param in self._params.items()
            if name in part.owners and part.rests_whole(name, active)
        ]
        self._known = self.mat.gate.skip == "weights" or bool(active.all())

    def _watch(self, params: dict[str, nn.Parameter]) -> None:
        """Note which of some parameters get a gradient in the pass that follows."""
        self._unwatch()
        self._came = dict.fromkeys(params, False)
        # One may be there already, of a pass under ``no_sync`` or of another loss of this step.
        self._kept = {name: param.grad is not None for name, param in params.items()}
        for name, param in params.items():

            def note(grad: Tensor | None, name: str = name) -> None:
                self._came[name] = self._came[name] or grad is not None

            handle = param.register_hook(note)

            def remove(handle: Any = handle, param: nn.Parameter = param) -> None:
                handle.remove()
                forget(param)

            self._hooks.append(remove)

    def _agree(self) -> None:
        """Drop the gradients of watched parameters that got none on any rank."""
        self._unwatch()
        kept = [self._kept[name] or came for name, came in self._came.items()]
        flags = torch.tensor([list(self._came.values()), kept], dtype=torch.int32)
        device = next(iter(self._params.values())).device
        counts = flags.to(device)
        dist.all_reduce(counts, group=self.ddp.process_group)
        came, kept_by = counts.tolist()
        if not self._known:
            self._find_idle(dict(zip(self._came, came, strict=True)))
        for name, ranks in zip(self._came, kept_by, strict=True):
            if not ranks:
                self._params[name].grad = None

    def _find_idle(self, came: dict[str, int]) -> None:
        """Take the parameters that train and got no gradient for those to be watched."""
        size = dist.get_world_size(self.ddp.process_group)
        for name, ranks in came.items():
            if 0 < ranks < size:
                raise RuntimeError(
                    f"parameter {name!r} got a gradient in {ranks} of {size} processes only: the "
                    "model uses other parameters for other samples, so let DDP look in every step, "
                    'with strategy="ddp_find_unused_parameters_true" or '
                    "MATDDPStrategy(find_unused_parameters=True)"
                )
        resting = set(map(id, self._resting))
        self._idle = {
            name: self._params[name]
            for name, ranks in came.items()
            if not ranks and id(self._params[name]) not in resting
        }
        self._known = True
