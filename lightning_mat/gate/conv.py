"""Gate rule for ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``: filters and input channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from lightning_mat.gate.channels import ConvPlan, make_plan
from lightning_mat.gate.compiled import Gradients
from lightning_mat.gate.convolution import all_gradients, convolve
from lightning_mat.gate.plan import covers
from lightning_mat.gate.rules import Forward, Rest, Static, register_gate_rule

Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def conv_rule(module: nn.Module, rests: Mapping[str, Rest]) -> Forward | None:
    """Return the forward of a convolution of which something rests.

    None where a slice cuts through a kernel, or a subclass does something else with it.
    """
    layer = cast(Layer, module)
    plan = _plan(module, rests)
    if plan is None:
        return None
    none = (0,) * len(plan.stride)
    return lambda input: convolve(layer, input, plan, none)


def conv_gradients(module: nn.Module, rests: Mapping[str, Rest]) -> Gradients | None:
    """Return what computes the gradients of a convolution in a compiled model."""
    plan = _plan(module, rests)
    return None if plan is None else lambda *args: all_gradients(plan, *args)


def _plan(module: nn.Module, rests: Mapping[str, Rest]) -> ConvPlan | None:
    known = any(type(module)._conv_forward is layer._conv_forward for layer in LAYERS)  # type: ignore[attr-defined]
    return make_plan(cast(Layer, module), rests) if covers(module, rests) and known else None


def _plain(module: Layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return cast(Tensor, module._conv_forward(x, weight, bias))


for _layer in LAYERS:
    register_gate_rule(_layer, conv_rule, static=Static(plain=_plain, gradients=conv_gradients))
