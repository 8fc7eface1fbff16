"""Slicer: shows an optimizer the training slabs as its parameters while it steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mat.optim.cohort import Cohort, settle_scalars
from lightning_mat.optim.pieces import Piece
from lightning_mat.optim.slabs import History, Slab, history_of, latest, slabs_of
from lightning_mat.units.core import Partition


@dataclass
class GroupPlan:
    """What one parameter group steps: whole parameters, and cohorts of sliced ones."""

    size: int
    whole: list[Tensor] = field(default_factory=list)
    sliced: list[tuple[Tensor, list[Cohort]]] = field(default_factory=list)


class Slicer:
    """Makes every step of an optimizer a step of the slabs that train.

    While the optimizer steps, its parameter groups hold, in place of each sliced parameter,
    *pieces* of it: views of runs of training slabs with equal histories (or packed copies, where
    views would be slow or unsafe). The optimizer's own code does the arithmetic. Between steps the
    groups hold the parameters. What the optimizer learnt about pieces (moments, step counts) goes
    to the parameters' own state whenever somebody looks, through :meth:`settle`.

    Args:
        inner: The optimizer.
        model: The model whose parameters the partition names.
        part: The units.
    """

    def __init__(self, inner: Optimizer, model: nn.Module, part: Partition) -> None:
        """Find the slabs, and hook into the optimizer."""
        params = dict(model.named_parameters())
        self.inner = inner
        self.part = part
        self.active: list[bool] = [True] * len(part)
        self.names: dict[Tensor, str] = {params[name]: name for name in part.owners}
        self.slabs: dict[Tensor, tuple[Slab, ...]] = {
            params[name]: slabs_of(part, name) for name in part.owners
        }
        # Only for parameters whose slabs differ; the others' slabs all follow inner.state.
        self.histories: dict[Tensor, list[History]] = {}
        self._plan: list[GroupPlan] | None = None
        self._vanilla = True
        self._shown: list[list[Tensor]] | None = None
        self._stepping: list[tuple[Tensor, Piece, Tensor, bool]] = []
        self._attach()

    def _attach(self) -> None:
        self._hooks = [
            self.inner.register_step_pre_hook(self._before_step),
            self.inner.register_step_post_hook(self._after_step),
            self.inner.register_state_dict_pre_hook(lambda _: self.settle(), prepend=True),
            self.inner.register_load_state_dict_post_hook(lambda _: self.forget(), prepend=True),
        ]
        # First, so that everybody else's hooks see the parameters.
        self.inner._optimizer_step_post_hooks.move_to_end(self._hooks[1].id, last=False)  # type: ignore[attr-defined]

    @classmethod
    def is_attached_to(cls, inner: Optimizer) -> bool:
        """Return whether an optimizer is sliced already."""
        hooks = inner._optimizer_step_pre_hooks.values()
        return any(isinstance(getattr(hook, "__self__", None), cls) for hook in hooks)

    def detach(self) -> None:
        """Leave an ordinary optimizer with up-to-date state."""
        self.settle()
        for hook in self._hooks:
            hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without plan and hooks."""
        self.settle()
        return {
            key: self.__dict__[key]
            for key in ("inner", "part", "active", "names", "slabs", "histories")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, and hook into the restored optimizer."""
        self.__dict__.update(state, _plan=None, _shown=None, _stepping=[])
        self._attach()

    def apply(self, active: Sequence[bool]) -> None:
        """Set which units train from the next step on."""
        if list(active) != self.active:
            self.settle()
            self.active = list(active)

    def forget(self) -> None:
        """Drop plan and histories: every slab takes its parameter's state."""
        self._plan = None
        self.histories = {}

    # Planning

    def _histories_of(self, param: Tensor) -> list[History]:
        known = self.histories.get(param)
        if known is not None:
            return known
        try:
            history = history_of(self.inner.state.get(param, {}), param.shape)
        except TypeError as error:
            raise TypeError(f"parameter {self.names[param]!r}: {error}") from None
        return [history] * len(self.slabs[param])

    def _cohorts(self, param: Tensor, *, fused: bool) -> list[Cohort] | None:
        """Return what trains of a parameter; None stands for all of it as one."""
        slabs = self.slabs[param]
        on = [i for i, s in enumerate(slabs) if s.unit is None or self.active[s.unit]]
        if len(slabs) == 1 or not on:
            return None if on else []
        histories = self._histories_of(param)
        if len(on) == len(slabs) and len(set(histories)) == 1:
            self.histories.pop(param, None)
            return None
        self.histories[param] = histories
        if type(param.data) is not Tensor:
            raise TypeError(
                f"parameter {self.names[param]!r} is a {type(param.data).__name__}, of which no "
                "slab can be stepped on its own: let its units own whole parameters"
            )
        alike: dict[History, list[int]] = {}
        for index in on:
            alike.setdefault(histories[index], []).append(index)
        return [
            Cohort(
                param,
                slabs,
                members,
                history,
                self.inner.state.get(param, {}),
                list_kernels=fused or param.device.type != "cpu",
            )
            for history, members in alike.items()
        ]

    def _plan_group(self, group: dict[str, Any]) -> GroupPlan:
        plan = GroupPlan(len(group["params"]))
        for param in group["params"]:
            sliced = param in self.slabs
            cohorts = self._cohorts(param, fused=bool(group.get("fused"))) if sliced else None
            if cohorts is None:
                plan.whole.append(param)
            elif cohorts:
                plan.sliced.append((param, cohorts))
        return plan

    @torch.no_grad()
    def _planned(self) -> list[GroupPlan]:
        groups = self.inner.param_groups
        sizes = [len(group["params"]) for group in groups]
        if self._plan is None or sizes != [plan.size for plan in self._plan]:
            self.settle()
            self._plan = [self._plan_group(group) for group in groups]
            self._vanilla = all(
                len(plan.whole) == plan.size and not self._fresh(group, plan.whole)
                for group, plan in zip(groups, self._plan, strict=True)
            )
        return self._plan

    # Stepping

    def _before_step(
        self, inner: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self.restore()
        self._planned()
        if self._vanilla:
            return None
        closure: Callable[[], Any] | None = args[1] if len(args) > 1 else kwargs.get("closure")

        # Optimizers call the closure before anything else: the gradients exist only after it.
        def closure_then_show() -> Any:
            loss = None if closure is None else closure()
            self._show()
            return loss

        kwargs = {key: value for key, value in kwargs.items() if key != "closure"}
        return (inner, closure_then_show, *args[2:]), kwargs

    def _after_step(self, *_: object) -> None:
        self.restore()

    @torch.no_grad()
    def _show(self) -> None:
        """Put the pieces where the optimizer looks for parameters."""
        plans = self._planned()
        groups = self.inner.param_groups
        self._shown = [group["params"] for group in groups]
        for group, plan in zip(list(groups), plans, strict=True):
            tensors = list(plan.whole)
            for param, cohorts in plan.sliced:
                if param.grad is not None:
                    tensors += self._pieces_with_gradients(param, param.grad, cohorts)
            fresh = self._fresh(group, tensors)
            if fresh:
                known = set(fresh)
                tensors = [t for t in tensors if t not in known]
                groups.append({**group, "params": fresh})
            group["params"] = tensors

    def _pieces_with_gradients(
        self, param: Tensor, grad: Tensor, cohorts: list[Cohort]
    ) -> list[Tensor]:
        if grad.layout is not torch.strided:
            raise RuntimeError(
                f"parameter {self.names[param]!r} has a sparse gradient, of which no slab can be "
                "stepped on its own: use a dense gradient (Embedding(sparse=False)), or let its "
                "units own whole parameters"
            )
        tensors = []
        values = param.detach()  # shares memory and version counter
        for cohort in cohorts:
            for piece in cohort.pieces:
                tensor = piece.with_gradient(values, grad)
                self._stepping.append((param, piece, tensor, not piece.state))
                self.inner.state[tensor] = piece.state
                tensors.append(tensor)
        return tensors

    def _fresh(self, group: dict[str, Any], tensors: list[Tensor]) -> list[Tensor]:
        """Return the tensors that make their first step, if they need a group of their own.

        Fused SGD decides for a whole group whether its momentum buffers exist yet.
        """
        if not group.get("fused"):
            return []
        state = self.inner.state
        fresh = [t for t in tensors if all(v is None for v in state.get(t, {}).values())]
        return fresh if len(fresh) < len(tensors) else []

    @torch.no_grad()
    def restore(self) -> None:
        """Put the parameters back where the pieces are; does nothing outside a step."""
        if self._shown is None:
            return
        groups = self.inner.param_groups
        del groups[len(self._shown) :]
        for group, params in zip(groups, self._shown, strict=True):
            group["params"] = params
        stateful = False
        for param, piece, tensor, was_empty in self._stepping:
            piece.state = self.inner.state.pop(tensor)
            piece.put(param, tensor)
            stateful |= was_empty and bool(piece.state)
        self._shown, self._stepping = None, []
        if stateful:  # new state moves to where a resumed run would have it, in the same layout
            self.settle()

    # Settling

    @torch.no_grad()
    def settle(self) -> None:
        """Write what the pieces know to ``inner.state``, and plan afresh at the next step."""
        plans, self._plan = self._plan or [], None
        for plan in plans:
            for param, cohorts in plan.sliced:
                histories = self.histories[param]
                for cohort in cohorts:
                    history = cohort.history
                    if history:
                        cohort.settle(param, self.inner.state[param])
                    for index in cohort.members:
                        histories[index] = history
                settle_scalars(param.shape, self.inner.state.get(param, {}), latest(histories))
