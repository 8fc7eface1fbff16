"""What sharded checkpoints lose of an optimizer's state.

``torch.distributed.checkpoint`` keeps an optimizer's ``"state"`` and ``"param_groups"`` and drops
all else, and it loads a state only if every parameter has one. So parameters that have never
trained get one as it is before a first step, and who they are is saved beside it, with the step
counts of the slabs. With the callback it is dropped again; without it training goes on from there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_mat.optim.slabs import is_elementwise
from lightning_mat.shards import is_sharded


def without_state(inner: Optimizer) -> list[int]:
    """Return which parameters have no state yet, by their places in the groups."""
    return [i for i, param in enumerate(_params(inner)) if not inner.state.get(param)]


def complete(inner: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Give sharded parameters without state one in an optimizer's ``state_dict``.

    It has what those of the others have, each with the value that ``torch.optim`` begins with, so
    that a run without the callback may go on from it: a step count of 10,000 over moments of zero
    would make Adam's next update three times too long. (SGD begins with the first gradient where
    this has zeros: with ``dampening`` its first step is shorter.) :func:`drop` takes it away after
    it was loaded. Where no parameter has any, nothing changes.

    Args:
        inner: The optimizer.
        state_dict: Its own; changed in place.
    """
    params = _params(inner)
    # Of a tensor without dimensions, step counts would look elementwise.
    like = next((param for param in params if param.dim() and inner.state.get(param)), None)
    if like is None:
        return
    groups = [group for group in inner.param_groups for _ in group["params"]]
    for index in without_state(inner):
        param = params[index]
        if is_sharded(param):
            state_dict["state"][index] = {
                key: _blank(value, _first(key, groups[index]), like, param)
                for key, value in inner.state[like].items()
            }


def drop(inner: Optimizer, places: Iterable[int]) -> None:
    """Take the state of some parameters away."""
    params = _params(inner)
    for index in places:
        inner.state.pop(params[index], None)


def _params(inner: Optimizer) -> list[Tensor]:
    return [param for group in inner.param_groups for param in group["params"]]


def _first(key: str, group: Mapping[str, Any]) -> float:
    """Return what a state value is before the first step.

    Source:
        ``_init_group`` of every optimizer in ``torch.optim``: zeros but for NAdam, ASGD and Rprop
        (Adagrad has its state from the start).
    """
    if key in ("mu_product", "mu"):
        return 1.0
    return float(group["lr"]) if key in ("eta", "step_size") else 0.0


def _blank(value: Any, first: float, like: Tensor, param: Tensor) -> Any:
    if is_elementwise(value, like.shape):
        return torch.full_like(param, first, dtype=value.dtype)
    return torch.full_like(value, first) if isinstance(value, Tensor) else value
