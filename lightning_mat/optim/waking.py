"""What becomes of a unit's moments when it wakes: kept, reset or decayed.

Adam's estimates are weighted means of the gradients that a unit has seen: ``exp_avg_sq`` after t
steps is a sum of g² with weights that add up to 1 - β₂ᵗ, and the bias correction divides by that.
During a rest there are no gradients, which is not the same as gradients of zero:

- **keep** (default): moments and step count stay as they were. The weights still add up to
  1 - β₂ᵗ, so that the first update has the right size; its direction is 1 - β₁ new and β₁ old.
- **reset**: nothing is left, and the first update is the one of a first step.
- **decay**: what was seen n steps ago counts as little as it would, had training gone on:
  ``exp_avg`` ·= β₁ⁿ, ``exp_avg_sq`` ·= β₂ⁿ. If the step count went on to t + n besides, the weights
  would add up to β₂ⁿ(1 - β₂ᵗ) but be divided by 1 - β₂ᵗ⁺ⁿ ≈ 1, and the first update after a long
  rest would be (1 - β₁)/√(1 - β₂) times too large, 3.2 times by default. So the step count becomes
  the s with 1 - β₂ˢ = β₂ⁿ(1 - β₂ᵗ), between 0 and t and no whole number in general: the estimate
  of g² is the one from before the rest, and new gradients displace it the faster, the longer the
  rest was. ``exp_avg`` then counts the missing gradients as zeros (its correction is 1 - β₁ˢ): the
  old direction fades, the first update is at most as large as without a rest where gradients stay
  alike, and after an endless rest it is that of a first step.

SGD's momentum buffer ·= μⁿ. A second moment without bias correction (RMSprop, Adadelta) or a sum
(Adagrad) has no right decay: it would shrink with nothing to make up for it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from lightning_mat.optim.slabs import Box, History, Slab, boxes_in, is_elementwise
from lightning_mat.shards import local_of

WAKING = ("keep", "reset", "decay")


class Change(NamedTuple):
    """What waking does to the state of a slab.

    Attributes:
        affine: State key → (a, b): each of its numbers x becomes a·x + b.
        step: The new step count; None leaves it.
        forget: Whether the state is to be as if it had never been made; the rest is ignored then.
    """

    affine: Mapping[str, tuple[float, float]]
    step: float | None = None
    forget: bool = False


ChangeOf = Callable[[Mapping[str, Any], float, int], Change]
"""``(parameter group, step count, steps rested) -> Change``."""


def change_of(waking: str, inner: Optimizer) -> ChangeOf | None:
    """Return what waking does to the state of an optimizer; None for nothing.

    Raises:
        ValueError: If the word is unknown, or it is not known how the optimizer's state decays.
    """
    if waking not in WAKING:
        raise ValueError(f"waking must be one of {WAKING}, got {waking!r}")
    if waking == "keep":
        return None
    if waking == "reset":
        return _reset_adagrad if steps_like(inner, Adagrad) else _reset
    for known, change in ((SGD, _decay_sgd), (Adam, _decay_adam), (AdamW, _decay_adam)):
        if steps_like(inner, known):
            return change
    raise ValueError(
        f"waking='decay' knows how the state of SGD, Adam and AdamW decays, not that of "
        f"{type(inner).__name__}: use waking='keep' or waking='reset'"
    )


def steps_like(inner: Optimizer, known: type[Optimizer]) -> bool:
    """Return whether an optimizer is of a class or a subclass without a step of its own."""
    step = inspect.unwrap(type(inner).step)
    return isinstance(inner, known) and step is inspect.unwrap(known.step)


def wake(
    param: Tensor,
    state: dict[str, Any],
    slabs: Sequence[Slab],
    histories: list[History],
    rested: Mapping[int | None, int],
    change_of_slab: Callable[[float, int], Change],
) -> bool:
    """Change the state of a parameter's slabs that wake, and their histories.

    Args:
        param: The parameter.
        state: Its state, not empty; empty afterwards if no slab has any.
        slabs: All its slabs.
        histories: Of the slabs.
        rested: Unit → steps rested, of those that wake.
        change_of_slab: ``(step count, steps rested) -> Change``.

    Returns:
        Whether the slabs' histories are to be kept apart from the state.
    """
    if len(slabs) == 1:
        if slabs[0].unit in rested:
            step = float(state.get("step", 0.0))
            _change_whole(state, change_of_slab(step, rested[slabs[0].unit]))
        return False
    alike: dict[tuple[History, int], list[int]] = {}
    for index, slab in enumerate(slabs):
        if slab.unit in rested and histories[index]:
            alike.setdefault((histories[index], rested[slab.unit]), []).append(index)
    for (history, steps), members in alike.items():
        change = change_of_slab(dict(history).get("step", 0.0), steps)
        boxes = boxes_in(param, [rect for i in members for rect in slabs[i].rects])
        after = _change_boxes(param, state, boxes, history, change)
        for index in members:
            histories[index] = after
    if not any(histories):
        state.clear()
    return bool(state)


def _change_whole(state: dict[str, Any], change: Change) -> None:
    """Change the state of a parameter that one unit owns whole."""
    if change.forget:
        state.clear()
        return
    for key, (a, b) in change.affine.items():
        if isinstance(state.get(key), Tensor):
            state[key].mul_(a).add_(b)
    if change.step is not None:
        if isinstance(state["step"], Tensor):
            state["step"].fill_(change.step)
        else:
            state["step"] = change.step


def _change_boxes(
    param: Tensor,
    state: Mapping[str, Any],
    boxes: Sequence[Box],
    history: History,
    change: Change,
) -> History:
    """Change the state of some boxes of a parameter, and return their history from then on."""
    for key, value in state.items():
        a, b = (0.0, 0.0) if change.forget else change.affine.get(key, (1.0, 0.0))
        if is_elementwise(value, param.shape) and (a, b) != (1.0, 0.0):
            for box in boxes:
                local_of(value)[box].mul_(a).add_(b)
    if change.forget:
        return ()
    if change.step is None:
        return history
    return tuple((key, change.step if key == "step" else number) for key, number in history)


class Rests:
    """How many steps of the optimizer each unit has rested.

    A unit counts as resting from its first step without it: decisions between which no step is
    made leave no trace.
    """

    def __init__(self) -> None:
        """Begin with nothing at rest."""
        self._steps = 0
        self._since: dict[int, int] = {}

    def count(self) -> None:
        """Count a step."""
        self._steps += 1

    def turn(self, active: Sequence[bool]) -> dict[int | None, int]:
        """Take up the decision of the step to come; return unit → steps rested of those that wake.

        A unit that wakes before a step has passed is not listed.
        """
        for unit, on in enumerate(active):
            if not on:
                self._since.setdefault(unit, self._steps)
        woken = [unit for unit in self._since if active[unit]]
        rested = {unit: self._steps - self._since.pop(unit) for unit in woken}
        return {unit: steps for unit, steps in rested.items() if steps}

    def state(self, names: Sequence[str]) -> dict[str, int]:
        """Return unit name → steps rested so far, for a checkpoint."""
        return {names[unit]: self._steps - since for unit, since in self._since.items()}

    def load(self, names: Sequence[str], state: Mapping[str, int]) -> None:
        """Go on from :meth:`state`; units of other names are left out."""
        index = {name: unit for unit, name in enumerate(names)}
        known = {index[name]: rested for name, rested in state.items() if name in index}
        self._since = {unit: self._steps - int(rested) for unit, rested in known.items()}


def _reset(group: Mapping[str, Any], step: float, rested: int) -> Change:
    return Change({}, forget=True)


def _reset_adagrad(group: Mapping[str, Any], step: float, rested: int) -> Change:
    # Its state is made at construction, and a step expects to find it.
    return Change({"sum": (0.0, group["initial_accumulator_value"])}, step=0.0)


def _decay_sgd(group: Mapping[str, Any], step: float, rested: int) -> Change:
    return Change({"momentum_buffer": (float(group["momentum"]) ** rested, 0.0)})


def _decay_adam(group: Mapping[str, Any], step: float, rested: int) -> Change:
    beta1, beta2 = (float(beta) for beta in group["betas"])
    first, second = beta1**rested, beta2**rested
    affine = {key: (second, 0.0) for key in ("exp_avg_sq", "max_exp_avg_sq")}
    return Change({"exp_avg": (first, 0.0), **affine}, step=_equivalent_step(beta2, step, rested))


def _equivalent_step(beta: float, step: float, rested: int) -> float:
    """Return the s with 1 - βˢ = βⁿ(1 - βᵗ).

    Example:
        >>> _equivalent_step(0.5, 3, 0), _equivalent_step(0.999, 1000, 100_000) < 1e-12
        (3.0, True)
    """
    if beta == 0:
        return 0.0
    weight = beta**rested * -math.expm1(step * math.log(beta))
    # 1 - βᵗ rounds to 1 for a large t; without a rest nothing would change.
    return step if weight >= 1 else min(math.log1p(-weight) / math.log(beta), step)
