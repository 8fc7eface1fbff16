"""Gate rule for ``nn.ConvTranspose1d``, ``2d`` and ``3d``: input and output channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from lightning_mat.gate.channels import make_plan
from lightning_mat.gate.compiled import Gradients
from lightning_mat.gate.convolution import all_gradients, convolve
from lightning_mat.gate.plan import covers
from lightning_mat.gate.rules import Forward, Rest, Static, register_gate_rule

Layer = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


def transposed_rule(module: nn.Module, rests: Mapping[str, Rest]) -> Forward | None:
    """Return the forward of a transposed convolution of which something rests.

    None where a slice cuts through a kernel.
    """
    if not covers(module, rests):
        return None
    layer = cast(Layer, module)
    plan = make_plan(layer, rests)
    if plan is None:
        return None

    def run(input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        return convolve(layer, input, plan, _output_padding(layer, input, output_size))

    return run


def transposed_gradients(module: nn.Module, rests: Mapping[str, Rest]) -> Gradients | None:
    """Return what computes the gradients of a transposed convolution in a compiled model."""
    plan = make_plan(cast(Layer, module), rests) if covers(module, rests) else None
    return None if plan is None else lambda *args: all_gradients(plan, *args)


def _output_padding(
    layer: Layer, input: Tensor, output_size: Sequence[int] | None
) -> Sequence[int]:
    """Return what the layer adds to the size of its output, as its own forward finds it."""
    return layer._output_padding(
        input,
        cast("list[int] | None", output_size),
        cast("list[int]", layer.stride),
        cast("list[int]", layer.padding),
        cast("list[int]", layer.kernel_size),
        len(layer.kernel_size),
        cast("list[int]", layer.dilation),
    )


def _plain(module: Layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    batched = x.dim() == len(module.kernel_size) + 2
    out = torch.convolution(
        x if batched else x.unsqueeze(0),
        weight,
        bias,
        module.stride,
        cast("tuple[int, ...]", module.padding),
        module.dilation,
        True,
        module.output_padding,
        module.groups,
    )
    return out if batched else out.squeeze(0)


for _layer in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
    register_gate_rule(
        _layer, transposed_rule, static=Static(plain=_plain, gradients=transposed_gradients)
    )
