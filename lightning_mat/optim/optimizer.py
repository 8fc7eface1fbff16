"""MATOptimizer: an optimizer that steps the units that train and lets the others rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)

from lightning_mat.optim.beside import complete, drop, without_state
from lightning_mat.optim.moving import begin_anew, map_histories
from lightning_mat.optim.slabs import History, pack_histories, unpack_histories
from lightning_mat.optim.slicer import Slicer
from lightning_mat.optim.waking import steps_like
from lightning_mat.units.core import Partition

_ELEMENTWISE: list[type[Optimizer]] = [
    SGD, Adam, AdamW, Adadelta, Adagrad, Adamax, ASGD, NAdam, RAdam, RMSprop, Rprop,
]  # fmt: skip

Histories = dict[Tensor, list[History]]
Anew = dict[Tensor, set[int | None]]


class MATOptimizer(Optimizer):
    """Steps each unit as if its slab of every parameter were a parameter of its own.

    A unit that rests is treated as ``torch.optim`` treats a parameter whose ``grad`` is None: its
    values, moments, step count and weight decay all pause, and go on where they stopped when it
    wakes. What no unit owns trains always. While every unit trains (and none has rested), a step is
    the inner optimizer's own step.

    The optimizer inside does all arithmetic (for-loop, foreach or fused), and keeps its parameter
    groups, its state and its hooks; learning-rate schedulers, ``GradScaler`` and Lightning work on
    this object and on the one inside alike. Attributes that are not listed here are the inner
    optimizer's. State that is read through :attr:`state` or :meth:`state_dict` is up to date;
    small training parts (filters, biases, heads) keep a copy of their state between such reads.

    Args:
        inner: An optimizer whose update is elementwise: SGD, Adam, AdamW, Adadelta, Adagrad,
            Adamax, ASGD, NAdam, RAdam, RMSprop, Rprop, or one that was registered through
            :meth:`register_elementwise`. It may hold only some of the model's parameters.
        model: The model whose parameters the partition names.
        part: The units.
        waking: What becomes of the state (moments, step count) of a unit that wakes: ``"keep"``,
            it goes on where it stopped; ``"reset"``, it starts anew; ``"decay"`` (SGD, Adam and
            AdamW), old gradients count as little as if the steps of the rest had been made with
            gradients of zero, but bias corrections stay right. :mod:`lightning_mat.optim.waking`
            has the formulas and the reasons.
        on_partition_change: What :meth:`load_state_dict` does with the step counts of other slabs:
            ``"refuse"`` them, or ``"map"`` them, see :mod:`lightning_mat.optim.moving`.

    Raises:
        TypeError: If the update of ``inner`` is not known to be elementwise, or it is wrapped
            already.
        ValueError: If the partition was made for another model, ``inner`` is differentiable, or
            ``waking`` is unknown, also for this optimizer.

    Example:
        >>> import torch
        >>> from lightning_mat.units.unit import Slice, Unit
        >>> model = torch.nn.Linear(1, 2, bias=False)
        >>> units = [Unit(f"row.{i}", "ffn", "fc", (Slice("weight", 0, i, i + 1),)) for i in (0, 1)]
        >>> part = Partition(units, model)
        >>> optimizer = MATOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), model, part)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> optimizer.apply(torch.tensor([True, False]))
        >>> model(torch.ones(1)).sum().backward()
        >>> optimizer.step()
        >>> model.weight.flatten().tolist()
        [-1.0, 0.0]
    """

    # GradScaler then unscales the gradients first, also where the inner optimizer is fused.
    _step_supports_amp_scaling = False

    def __init__(
        self,
        inner: Optimizer,
        model: nn.Module,
        part: Partition,
        waking: str = "keep",
        on_partition_change: str = "refuse",
    ) -> None:
        """Check the optimizer against model and partition, and hook into it."""
        # The base class's __init__ is not called: groups, state and hooks are the inner's.
        _check_inner(inner)
        shapes = {name: param.shape for name, param in model.named_parameters()}
        for name in part.owners:
            if shapes.get(name) != part.shapes[name]:
                raise ValueError(
                    f"the partition has a parameter {name!r} of shape {tuple(part.shapes[name])}, "
                    f"the model {'none' if name not in shapes else tuple(shapes[name])}: pass the "
                    "model that the partition was made for"
                )
        # Nothing mutable here: Lightning's wrapper calls these methods on an object of its own.
        self.inner = inner
        self.part = part
        self.waking = waking
        self.on_partition_change = on_partition_change
        self._slicer = Slicer(inner, model, part, waking)

    @classmethod
    def register_elementwise(cls, optimizer: type[Optimizer]) -> type[Optimizer]:
        """Allow an optimizer class of your own; usable as a decorator.

        Its update of an element may depend only on this element's value, gradient and state and on
        scalars; it keeps its state per parameter (tensors of the parameter's shape, and scalars),
        creates it at the first step, and calls the closure before it reads its groups.

        Returns:
            The class.
        """
        if optimizer not in _ELEMENTWISE:
            _ELEMENTWISE.append(optimizer)
        return optimizer

    def apply(
        self, active: Tensor | Sequence[bool], rates: Tensor | Sequence[float] | None = None
    ) -> None:
        """Set which units train from the next step on, and how fast.

        Args:
            active: Which units train, bool, shape ``[L]``. All do until this is called.
            rates: Factors of the learning rate, shape ``[L]``: a unit that trains is stepped with
                ``group["lr"] * rate``, of those that rest nothing is read. None is 1 for all. What
                no unit owns has the group's own learning rate, and so have the groups that
                learning-rate schedulers see.

        Raises:
            ValueError: If ``active`` is not a bool tensor of length L, or ``rates`` is none of L
                numbers, finite and above 0 for each unit that trains, or a parameter group has no
                learning rate for them.
        """
        training = self.part.check_active(active)
        self._slicer.apply(training.tolist(), self._check_rates(rates, training))

    def _check_rates(self, rates: Tensor | Sequence[float] | None, active: Tensor) -> list[float]:
        units = len(self.part)
        if rates is None:
            return [1.0] * units
        factors = torch.as_tensor(rates, dtype=torch.float64).detach().cpu()
        if factors.shape != (units,):
            raise ValueError(
                f"rates must have one factor for each of the {units} units, got shape "
                f"{tuple(factors.shape)}"
            )
        wrong = active.cpu() & ~(factors.isfinite() & (factors > 0))
        if wrong.any():
            unit = int(wrong.nonzero()[0])
            raise ValueError(
                f"rates must be finite and above 0 for units that train, got {factors[unit]} for "
                f"{self.part.names[unit]!r}: a unit that is not to move rests (active=False)"
            )
        if any("lr" not in group for group in self.inner.param_groups):
            raise ValueError(
                f"rates are factors of a group's 'lr', and {type(self.inner).__name__} has a "
                "parameter group without one: pass rates=None"
            )
        return [float(factor) for factor in factors]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the units that train.

        Args:
            closure: Recomputes the loss and the gradients, as in ``torch.optim``.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: If a parameter that is stepped in part has a sparse gradient.
        """
        try:
            return self.inner.step() if closure is None else self.inner.step(closure)
        finally:
            self._slicer.restore()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters, of resting units too."""
        self.inner.zero_grad(set_to_none)

    def ensure_gradient(self) -> None:
        """Give one resting parameter a gradient of zeros where no parameter has a gradient.

        Call it between the backward pass and ``GradScaler.step``, which raises "No inf checks were
        recorded" for an optimizer without a single gradient: one of several whose units all rest.
        The parameter is not stepped.
        """
        params = [param for group in self.inner.param_groups for param in group["params"]]
        if any(param.grad is not None for param in params):
            return
        resting = [param for param in params if self._slicer.rests_whole(param)]
        if resting:
            smallest = min(resting, key=Tensor.numel)
            smallest.grad = torch.zeros_like(smallest)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; units that own parts of its parameters are known already."""
        self.inner.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's ``state_dict`` and, under ``"mat"``, what it cannot hold.

        The state has the layout of the inner optimizer, with a whole tensor for each parameter and
        the step count of its most-trained slab, and plain ``torch.optim`` loads it. ``"mat"`` holds
        for each parameter whose slabs differ their rectangles and step counts, in tensors. Unless
        ``waking="keep"``, ``"mat_rested"`` holds for how many steps which units have rested.
        """
        state = self.inner.state_dict()
        complete(self.inner, state)
        return {**state, **self._packed()}

    def state_beside(self) -> dict[str, Any]:
        """Return what sharded checkpoints drop of :meth:`state_dict`; the same on every rank."""
        self._slicer.settle()
        return {**self._packed(), "without": without_state(self.inner)}

    def load_state_beside(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_beside`, after the state itself was loaded, or with it.

        Without any state it is kept for the next :meth:`load_state_dict`: Lightning restores
        callbacks before the optimizers where the model is not sharded.

        Raises:
            ValueError: As :meth:`load_state_dict`.
        """
        if not self.inner.state:
            self._slicer.beside = dict(state)
            return
        histories, anew = self._unpacked(state)
        drop(self.inner, state["without"])
        self._slicer.forget()
        self._take_up(state, histories, anew)

    def _packed(self) -> dict[str, Any]:
        slicer = self._slicer
        state: dict[str, Any] = {
            "mat": {
                slicer.names[param]: pack_histories(slicer.slabs[param], histories)
                for param, histories in slicer.histories.items()
            }
        }
        if self.waking != "keep":
            state["mat_rested"] = slicer.rests.state(self.part.names)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, of this class or of the inner optimizer's.

        Args:
            state_dict: Without ``"mat"``, every slab takes its parameter's step count.

        Raises:
            ValueError: If the slabs differ from those of the saved run, and are not to be mapped;
                nothing is loaded then.
        """
        beside, self._slicer.beside = self._slicer.beside, {}
        known = state_dict if "mat" in state_dict else beside
        histories, anew = self._unpacked(known)
        self.inner.load_state_dict(state_dict)
        drop(self.inner, known.get("without", ()))
        self._take_up(known, histories, anew)

    def _unpacked(self, state: Mapping[str, Any]) -> tuple[Histories, Anew]:
        """Return the histories of slabs in a state, and the units of those that begin anew."""
        slicer = self._slicer
        params = {name: param for param, name in slicer.names.items()}
        maps = self.on_partition_change == "map"
        histories: Histories = {}
        anew: Anew = {}
        for name, packed in state.get("mat", {}).items():
            param = params.get(name)
            loaded = None if param is None else unpack_histories(slicer.slabs[param], packed)
            if loaded is None and maps:
                if param is None:
                    continue  # no unit's any more: whole, as plain torch.optim loads it
                loaded, anew[param] = map_histories(slicer.slabs[param], packed)
            if param is None or loaded is None:
                raise ValueError(
                    f"the saved optimizer state has other slabs of {name!r} than the partition: "
                    'resume with the units of the saved run, or pass on_partition_change="map" to '
                    "keep what carries over, or drop the step counts per unit with "
                    'state_dict.pop("mat")'
                )
            histories[param] = loaded
        return histories, anew

    def _take_up(self, state: Mapping[str, Any], histories: Histories, anew: Anew) -> None:
        """Go on from some histories; the state of their parameters is there."""
        slicer = self._slicer
        begin_anew(self.inner, slicer.slabs, histories, anew)
        slicer.histories = histories
        slicer.rests.load(self.part.names, state.get("mat_rested", {}))

    def unwrap(self) -> Optimizer:
        """Return the inner optimizer as an ordinary one, its state up to date.

        It has one step count for a parameter, that of the slab with the most: Adam then corrects
        the moments of slabs with fewer too little, and their next updates are longer.
        """
        self._slicer.detach()
        return self.inner

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The inner optimizer's state, brought up to date."""
        self._slicer.settle()
        return self.inner.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        self._slicer.settle()
        self._slicer.forget()
        self.inner.state = state

    @property
    def optimizer(self) -> Optimizer:
        """The inner optimizer, by the name under which Lightning unwraps others' wrappers."""
        return self.inner

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's parameter groups; a list that is set becomes the inner's."""
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._slicer.settle()
        self.inner.param_groups = groups

    def __getattr__(self, name: str) -> Any:
        """Return the inner optimizer's attribute."""
        if "inner" not in self.__dict__:  # before __init__ or __setstate__
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle or copy with the inner optimizer; hooks are left out, as in ``torch.optim``."""
        keys = ("inner", "part", "waking", "on_partition_change", "_slicer")
        return {key: self.__dict__[key] for key in keys}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Restore."""
        self.__dict__.update(state)

    def __repr__(self) -> str:
        """Return the number of training units and the inner optimizer."""
        training = f"{sum(self._slicer.active)} of {len(self.part)} units train"
        return f"MATOptimizer({training}, {self.inner!r})"


def _check_inner(inner: Optimizer) -> None:
    name = type(inner).__name__
    if isinstance(inner, MATOptimizer) or Slicer.is_attached_to(inner):
        raise TypeError(
            f"this {name} is in a MATOptimizer already: use that one, or unwrap() it first"
        )
    # A subclass is as elementwise as its base where it does not bring its own step.
    if not any(steps_like(inner, known) for known in _ELEMENTWISE):
        supported = ", ".join(known.__name__ for known in _ELEMENTWISE)
        raise TypeError(
            f"the update of {name} is not known to be elementwise, so that no part of a parameter "
            f"can be stepped on its own: use one of {supported}, or, if each element's update "
            f"depends on nothing but itself and scalars, MATOptimizer.register_elementwise({name})"
        )
    if any(group.get("differentiable") for group in inner.param_groups):
        raise ValueError(
            f"{name} has differentiable=True, and autograd cannot follow a step in slabs: use "
            "differentiable=False"
        )
