"""What sharded checkpoints lose of an optimizer's state.

``torch.distributed.checkpoint`` keeps an optimizer's ``"state"`` and ``"param_groups"`` and drops
all else, and it loads a state only if every parameter has one. So parameters that have never
trained get one of zeros, and who they are is saved beside it, with the step counts of the slabs.
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

    It looks like those of the others, and is taken away by :func:`drop` after it was loaded. Where
    no parameter has any, nothing changes.

    Args:
        inner: The optimizer.
        state_dict: Its own; changed in place.
    """
    params = _params(inner)
    like = next((param for param in params if inner.state.get(param)), None)
    if like is None:
        return
    for index in without_state(inner):
        param = params[index]
        if is_sharded(param):
            state_dict["state"][index] = {
                key: _blank(value, like, param) for key, value in inner.state[like].items()
            }


def drop(inner: Optimizer, places: Iterable[int]) -> None:
    """Take the state of some parameters away."""
    params = _params(inner)
    for index in places:
        inner.state.pop(params[index], None)


def _params(inner: Optimizer) -> list[Tensor]:
    return [param for group in inner.param_groups for param in group["params"]]


def _blank(value: Any, like: Tensor, param: Tensor) -> Any:
    if is_elementwise(value, like.shape):
        return torch.zeros_like(param, dtype=value.dtype)
    return value.clone() if isinstance(value, Tensor) else value
