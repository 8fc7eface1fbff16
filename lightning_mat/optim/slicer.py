"""Slicer: shows an optimizer the training slabs as its parameters while it steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from lightning_mat.optim.cohort import Cohort, settle_scalars, whole_in_chunks
from lightning_mat.optim.loading import LoadingGroups
from lightning_mat.optim.outermost import Outermost
from lightning_mat.optim.pieces import Piece, View, batches_of
from lightning_mat.optim.plan import GroupPlan
from lightning_mat.optim.pool import Pool
from lightning_mat.optim.slabs import History, Slab, history_of, latest, slabs_of
from lightning_mat.optim.waking import Rests, change_of, steps_like, wake
from lightning_mat.shards import is_sharded, local_of
from lightning_mat.units.core import Partition


class Slicer:
    """Makes every step of an optimizer a step of the slabs that train.

    While the optimizer steps, its parameter groups hold, in place of each sliced parameter,
    *pieces* of it: views of runs of training slabs with equal histories, or pools of copies where
    views would be slow or unsafe. The optimizer's own code does the arithmetic. Between steps the
    groups hold the parameters. What the optimizer learnt about pieces (moments, step counts) goes
    to the parameters' own state whenever somebody looks, through :meth:`settle`.

    Args:
        inner: The optimizer.
        model: The model whose parameters the partition names.
        part: The units.
        waking: See :mod:`lightning_mat.optim.waking`.
    """

    def __init__(
        self, inner: Optimizer, model: nn.Module, part: Partition, waking: str = "keep"
    ) -> None:
        """Find the slabs, and hook into the optimizer."""
        self._change_of = change_of(waking, inner)
        params = dict(model.named_parameters())
        self.inner = inner
        self.part = part
        self.active: list[bool] = [True] * len(part)
        self.rates: list[float] = [1.0] * len(part)
        self.names: dict[Tensor, str] = {params[name]: name for name in part.owners}
        self.slabs: dict[Tensor, tuple[Slab, ...]] = {
            params[name]: slabs_of(part, name) for name in part.owners
        }
        # Only for parameters whose slabs differ; the others' slabs all follow inner.state.
        self.histories: dict[Tensor, list[History]] = {}
        self.rests = Rests()
        # Step counts that wait for the state that they belong to.
        self.beside: dict[str, Any] = {}
        self._plan: list[GroupPlan] | None = None
        self._sizes: list[int] = []
        self._vanilla = True
        self._groups: list[dict[str, Any]] = []
        self._shown: list[list[Tensor]] | None = None
        self._stepping: list[tuple[Tensor | None, Piece, Tensor, bool]] = []
        self._loaded: list[Pool] = []
        self._outermost = Outermost()
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
        kept = ["inner", "part", "active", "rates", "names", "slabs", "histories", "rests"]
        kept.append("_change_of")
        return {key: self.__dict__[key] for key in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, and hook into the restored optimizer."""
        self.__dict__.update(state, beside={}, _plan=None, _shown=None)
        self._outermost = Outermost()
        self.__dict__.update({key: [] for key in ("_sizes", "_groups", "_stepping", "_loaded")})
        self._attach()

    def apply(self, active: Sequence[bool], rates: Sequence[float]) -> None:
        """Set which units train from the next step on, and the factors of their learning rates."""
        rates = [rate if on else 1.0 for rate, on in zip(rates, active, strict=True)]
        if (list(active), rates) != (self.active, self.rates):
            self.settle()
            self.active, self.rates = list(active), rates

    def rests_whole(self, param: Tensor) -> bool:
        """Return whether no element of a parameter trains."""
        slabs = self.slabs.get(param, ())
        return bool(slabs) and not any(s.unit is None or self.active[s.unit] for s in slabs)

    def forget(self) -> None:
        """Drop plan and histories: every slab takes its parameter's state."""
        self._plan = None
        self.histories = {}
        self.rests = Rests()

    # Waking

    def _wake(self) -> None:
        """Change the state of the units that are about to make their first step after a rest."""
        rested = self.rests.turn(self.active)
        if self._change_of is None or not rested:
            return
        for group in self.inner.param_groups:
            for param in group["params"]:
                state = self.inner.state.get(param)
                if param not in self.slabs or not state:
                    continue
                histories = list(self._histories_of(param))
                step = partial(self._change_of, group)
                if wake(param, state, self.slabs[param], histories, rested, step):
                    self.histories[param] = histories
                    settle_scalars(param.shape, state, latest(histories))
                else:
                    self.histories.pop(param, None)

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

    def _rate_of(self, slab: Slab) -> float:
        return 1.0 if slab.unit is None else self.rates[slab.unit]

    def _cohorts(self, param: Tensor, *, fused: bool) -> dict[float, list[Cohort] | None]:
        """Return what trains of a parameter by its rate; None stands for all of it as one."""
        slabs = self.slabs[param]
        on = [i for i, s in enumerate(slabs) if s.unit is None or self.active[s.unit]]
        rates = {i: self._rate_of(slabs[i]) for i in on}
        if len(slabs) == 1 or not on:
            return {rates[i]: None for i in on}
        histories = self._histories_of(param)
        if len(on) == len(slabs) and len({*zip(histories, rates.values(), strict=True)}) == 1:
            self.histories.pop(param, None)
            return {rates[0]: None}
        self.histories[param] = histories
        if type(param.data) is not Tensor and not is_sharded(param):
            raise TypeError(
                f"parameter {self.names[param]!r} is a {type(param.data).__name__}, of which no "
                "slab can be stepped on its own: let its units own whole parameters"
            )
        alike: dict[tuple[float, History], list[int]] = {}
        for index in on:
            alike.setdefault((rates[index], histories[index]), []).append(index)
        state = self.inner.state.get(param, {})
        cohorts: dict[float, list[Cohort] | None] = {}
        for (rate, history), members in alike.items():
            cohort = Cohort(param, slabs, members, history, state, fused=fused)
            cohorts[rate] = [*(cohorts.get(rate) or ()), cohort]
        return cohorts

    def _plan_group(self, index: int, group: dict[str, Any]) -> list[GroupPlan]:
        """Return a plan for each rate; the first is of rate 1, also if it has nothing to step."""
        plans = {1.0: GroupPlan(index)}
        for param in group["params"]:
            by_rate: dict[float, list[Cohort] | None] = {1.0: None}
            if param in self.slabs:
                by_rate = self._cohorts(param, fused=bool(group.get("fused")))
            for rate, cohorts in by_rate.items():
                plan = plans.setdefault(rate, GroupPlan(index, rate))
                if cohorts is None:
                    plan.whole.append(param)
                else:
                    plan.sliced.append((param, cohorts))
        return list(plans.values())

    def _cut_whole(self, group: dict[str, Any], plan: GroupPlan) -> None:
        """Step large and sharded parameters that train whole in chunks; see :func:`chunk_of`."""
        adam = steps_like(self.inner, Adam) or steps_like(self.inner, AdamW)
        fused = bool(group.get("fused"))
        cuts = adam and not fused  # others may get sparse gradients
        whole, plan.whole = plan.whole, []
        for param in whole:
            cohort = None
            if cuts or is_sharded(param):
                state = self.inner.state.get(param, {})
                cohort = whole_in_chunks(param, state, fused=fused)
            if cohort is None:
                plan.whole.append(param)
                continue
            plan.sliced.append((param, [cohort]))

    @torch.no_grad()
    def _planned(self) -> list[GroupPlan]:
        groups = self.inner.param_groups
        sizes = [len(group["params"]) for group in groups]
        if self._plan is None or sizes != self._sizes:
            self.settle()
            # Somebody may have emptied the state: nothing is known of the slabs then.
            state = self.inner.state
            self.histories = {p: known for p, known in self.histories.items() if state.get(p)}
            self._wake()
            self._sizes = sizes
            self._plan = [p for i, group in enumerate(groups) for p in self._plan_group(i, group)]
            self._vanilla = len(self._plan) == len(groups) and all(
                len(plan.whole) == size and not self._fresh(group, plan.whole)
                for group, plan, size in zip(groups, self._plan, sizes, strict=True)
            )
            if not self._vanilla:
                for plan in self._plan:
                    self._cut_whole(groups[plan.index], plan)
        return self._plan

    # Stepping

    def _before_step(
        self, inner: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._outermost.begins(depth=2):
            return None
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
        if not self._outermost.ends(depth=2):
            return
        self.restore()
        self.rests.count()

    def _pooled(self) -> list[GroupPlan]:
        """Return the plan with pools of what has a gradient in this step."""
        plans = self._planned()
        if any(p.pools is not None and p.pooled_with != p.with_gradient() for p in plans):
            self.settle()  # what has no gradient falls behind the others in its pool
            plans = self._planned()
        for plan in plans:
            group = self.inner.param_groups[plan.index]
            if plan.pools is None:
                fused, alone = bool(group.get("fused")), self._one_by_one(group)
                plan.make_pools(self.inner.state, share_room=alone, fused=fused)
        return plans

    @torch.no_grad()
    def _show(self) -> None:
        """Put the pieces where the optimizer looks for parameters."""
        plans = self._pooled()
        groups = self._groups = self.inner.param_groups
        self._shown = [group["params"] for group in groups]
        alone: list[tuple[Pool, dict[str, Any]]] = []
        for plan in plans:
            group = groups[plan.index]
            options = plan.options(group)
            tensors = list(plan.whole)
            for param, cohorts in plan.sliced:
                if param.grad is not None:
                    tensors += self._views_with_gradients(param, param.grad, cohorts)
            for pool in plan.pools or ():
                tensor = self._enter(None, [pool.piece], [pool.tensor()])
                if pool.shares_room:
                    alone.append((pool, {**options, "params": tensor}))
                    continue
                pool.load()
                self._loaded.append(pool)
                tensors += tensor
            fresh = self._fresh(group, tensors)
            if fresh:
                known = set(fresh)
                tensors = [t for t in tensors if t not in known]
                groups.append({**options, "params": fresh})
            batches = batches_of(tensors) if group.get("foreach") else [tensors]
            if options is group:
                group["params"] = batches.pop(0)
            groups += [{**options, "params": batch} for batch in batches]
        if alone:
            pools = {len(groups) + i: pool for i, (pool, _) in enumerate(alone)}
            every = [*groups, *(group for _, group in alone)]
            self.inner.param_groups = LoadingGroups(every, pools)

    def _views_with_gradients(
        self, param: Tensor, grad: Tensor, cohorts: list[Cohort]
    ) -> list[Tensor]:
        if grad.layout is not torch.strided:
            if param not in self.slabs:
                return [param]  # the optimizer has its own words for it
            raise RuntimeError(
                f"parameter {self.names[param]!r} has a sparse gradient, of which no slab can be "
                "stepped on its own: use a dense gradient (Embedding(sparse=False)), or let its "
                "units own whole parameters"
            )
        values, grad = local_of(param).detach(), local_of(grad)  # share memory and version counter
        views = [piece for cohort in cohorts for piece in cohort.pieces]
        return self._enter(param, views, [view.with_gradient(values, grad) for view in views])

    def _enter(
        self, param: Tensor | None, pieces: Sequence[Piece], tensors: list[Tensor]
    ) -> list[Tensor]:
        """Note that pieces are stepped as some tensors, and hand the optimizer their state."""
        for piece, tensor in zip(pieces, tensors, strict=True):
            self._stepping.append((param, piece, tensor, not piece.state))
            self.inner.state[tensor] = piece.state
        return tensors

    def _one_by_one(self, group: dict[str, Any]) -> bool:
        """Return whether pools of a group may be loaded one after the other as they are stepped.

        On a GPU, launches cost more than memory, and of other optimizers it is not known that they
        pass over their groups once.
        """
        known = inspect.unwrap(type(self.inner).step).__module__.startswith("torch.optim.")
        return known and all(param.device.type == "cpu" for param in group["params"])

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
        groups = self.inner.param_groups = self._groups
        del groups[len(self._shown) :]
        for group, params in zip(groups, self._shown, strict=True):
            group["params"] = params
        stateful = False
        for param, piece, tensor, was_empty in self._stepping:
            piece.state = self.inner.state.pop(tensor)
            if isinstance(piece, View) and param is not None:
                piece.put(local_of(param), tensor)
            stateful |= was_empty and bool(piece.state)
        for pool in self._loaded:
            pool.unload()
        self._groups, self._shown, self._stepping, self._loaded = [], None, [], []
        if stateful:  # new state moves to where a resumed run would have it, in the same layout
            self.settle()

    # Settling

    @torch.no_grad()
    def settle(self) -> None:
        """Write what the pieces know to ``inner.state``, and plan afresh at the next step."""
        plans, self._plan = self._plan or [], None
        state = self.inner.state
        stepped: dict[Tensor, list[History]] = {}
        for plan in plans:
            for pool in plan.pools or ():
                if pool.piece.state:
                    pool.settle([state[param] for param in pool.params])
            for param, cohorts in plan.sliced:
                # Of one that trains whole, in chunks, no slab has a history of its own.
                histories = stepped.setdefault(param, self.histories.get(param, [()]))
                for cohort in cohorts:
                    history = cohort.history
                    if history and cohort.pieces:
                        cohort.settle(state[param])
                    for index in cohort.members:
                        histories[index] = history
        for param, histories in stepped.items():
            settle_scalars(param.shape, state.get(param, {}), latest(histories))
