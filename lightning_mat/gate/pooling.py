"""What pooling and means over positions make of a tensor with a differentiable part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_mat.gate.partly import Rule, live, named, register_partly_rule


def _pool(spatial: int) -> Rule:
    """Return the rule of functions that pool so many last dimensions, each channel alone."""

    def rule(
        func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Tensor | None:
        x, *rest = args or [None]
        if not live(x) or x.axis != -spatial - 1 or _gives_more(kwargs):
            return None
        return x.mapped(lambda tensor: func(tensor, *rest, **kwargs))

    return rule


def _reduce(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor | None:
    """Reduce dimensions that are not that of the features."""
    x, *rest = args or [None]
    given = {**kwargs, **dict(zip(("dim", "keepdim"), rest, strict=False))}
    dim = given.get("dim")
    dims = [dim] if isinstance(dim, int) else dim
    if not live(x) or not isinstance(dims, (list, tuple)) or len(rest) > 2 or _gives_more(kwargs):
        return None
    total = x.full.dim()
    dims = {d % total for d in dims}
    place = total + x.axis
    if not dims or place in dims:
        return None
    left = 0 if given.get("keepdim", False) else sum(d > place for d in dims)
    return x.mapped(lambda tensor: func(tensor, *rest, **kwargs), x.axis + left)


def _gives_more(kwargs: Mapping[str, Any]) -> bool:
    """Return whether a function returns indices, too, or writes to somebody's tensor."""
    return bool(kwargs.get("return_indices", False)) or kwargs.get("out") is not None


for _spatial in (1, 2, 3):
    _names = " ".join(f"{kind}_pool{_spatial}d" for kind in ("max", "avg", "adaptive_avg"))
    register_partly_rule(named(_names), _pool(_spatial))
register_partly_rule(named("mean sum"), _reduce)
