"""Convolutions of which nothing rests, and whose input has a differentiable part."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_mat.gate.channels import ConvPlan
from lightning_mat.gate.convolution import apply_plan
from lightning_mat.gate.partly import Partly, Rule, live, named, register_partly_rule
from lightning_mat.gate.selection import Selection

# Made once for each decision, whose selections are the keys.
_plans: weakref.WeakKeyDictionary[Selection, dict[tuple[Any, ...], ConvPlan | None]] = (
    weakref.WeakKeyDictionary()
)


def _reads(spatial: int) -> Rule:
    """Return the rule of ``torch.conv1d``, ``conv2d`` or ``conv3d``."""

    def sizes(value: int | Sequence[int]) -> tuple[int, ...]:
        found = (value,) if isinstance(value, int) else tuple(value)
        return found * spatial if len(found) == 1 else found

    def rule(
        func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Tensor | None:
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        usual = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
        given = {**usual, **dict(zip(names, args, strict=False)), **kwargs}
        x, weight, bias = given["input"], given["weight"], given["bias"]
        others = isinstance(weight, Partly) or isinstance(bias, Partly)
        if not live(x) or x.axis != -spatial - 1 or others or isinstance(given["padding"], str):
            return None
        geometry = tuple(sizes(given[name]) for name in ("stride", "padding", "dilation"))
        key = (*weight.shape[:2], weight.device, *geometry, given["groups"])
        known = _plans.setdefault(x.selection, {})
        if key not in known:
            known[key] = _whole(*key).reading(x.selection)
        plan = known[key]
        if plan is None:
            return None
        return apply_plan(plan, x.taken(), weight, bias, (0,) * spatial, x.full)

    return rule


def _whole(
    n_out: int,
    n_in: int,
    device: Any,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> ConvPlan:
    """Return the plan of a convolution of which everything trains."""
    out, into = (Selection([(0, size)], size, device) for size in (n_out, n_in))
    return ConvPlan(
        terms=(),
        kept=into,
        bias=out,
        bias_entries=out,
        weight_rest=None,
        bias_rest=None,
        out=out,
        into=into,
        passages=None,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        transposed=False,
        pad=(),
        pad_mode="constant",
        apart=False,
    )


for _spatial in (1, 2, 3):
    register_partly_rule(named(f"conv{_spatial}d"), _reads(_spatial))
