"""Models, units and optimizers that the optimizer tests share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mat.units.core import Partition
from lightning_mat.units.unit import Slice, Unit

Make = Callable[[Any], Optimizer]


class Model(nn.Module):
    """Parameters sliced in every way: rows, columns, both, in part, whole, not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(6, 4))
        self.bias = nn.Parameter(torch.randn(6))
        self.columns = nn.Parameter(torch.randn(3, 6))
        self.both = nn.Parameter(torch.randn(5, 5))
        self.conv = nn.Parameter(torch.randn(6, 4, 2, 2))
        conv_last = torch.randn(4, 6, 3, 3).to(memory_format=torch.channels_last)
        self.conv_last = nn.Parameter(conv_last)
        self.whole = nn.Parameter(torch.randn(2, 2))
        self.free = nn.Parameter(torch.randn(3))
        self.scalar = nn.Parameter(torch.randn(()))


def units_of(model: Model) -> Partition:
    slices = [
        [
            Slice("rows", 0, 2 * i, 2 * i + 2),
            Slice("bias", 0, 2 * i, 2 * i + 2),
            Slice("columns", 1, 2 * i, 2 * i + 2),
            Slice("conv", 0, i, i + 1),
            Slice("conv", 0, i + 2, i + 3),
            Slice("conv_last", 1, 2 * i, 2 * i + 1),
        ]
        for i in (0, 1)
    ]
    units = [Unit(f"unit.{i}", "ffn", "layer", tuple(owned)) for i, owned in enumerate(slices)]
    crossed = (Slice("both", 0, 1, 2), Slice("both", 1, 2, 4))
    units.append(Unit("rows", "filter", "layer", (Slice("rows", 0, 4, 6), Slice("conv", 0, 5))))
    units.append(Unit("crossed", "head", "layer", crossed))
    units.append(Unit("whole", "layer", "whole", (Slice("whole"), Slice("scalar"))))
    return Partition(units, model)


UNITS = 5
SCALARS = {"step", "mu_product", "eta", "mu"}


def gradients(
    model: nn.Module, generator: torch.Generator, missing: str | None = None
) -> dict[str, Tensor | None]:
    return {
        name: None
        if name == missing
        else torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
        for name, p in model.named_parameters()
    }


def set_gradients(model: nn.Module, grads: dict[str, Tensor | None]) -> None:
    for name, param in model.named_parameters():
        grad = grads[name]
        param.grad = None if grad is None else grad.clone()


SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
OPTIMIZERS: dict[str, Make] = {
    "sgd": partial(SGD, lr=0.1, weight_decay=0.1),
    "momentum": partial(SGD, lr=0.1, momentum=0.9, dampening=0.3, maximize=True),
    "nesterov": partial(SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": partial(Adam, lr=0.1, weight_decay=0.1, betas=(0.8, 0.9)),
    "adamw": partial(AdamW, lr=0.1, weight_decay=0.5, maximize=True),
    "amsgrad": partial(AdamW, lr=0.1, amsgrad=True),
    "no betas": partial(Adam, lr=0.1, betas=(0.0, 0.0), eps=1e-6),
}
OTHERS: dict[str, Make] = {
    "adadelta": torch.optim.Adadelta,
    "adagrad": partial(torch.optim.Adagrad, lr_decay=0.1, initial_accumulator_value=0.5),
    "adamax": torch.optim.Adamax,
    "asgd": partial(torch.optim.ASGD, t0=2),
    "nadam": torch.optim.NAdam,
    "radam": partial(torch.optim.RAdam, lr=0.1, betas=(0.5, 0.6)),
    "rmsprop": partial(torch.optim.RMSprop, centered=True, momentum=0.9),
    "rprop": partial(torch.optim.Rprop, lr=0.1),
    "tensor lr": partial(Adam, lr=torch.tensor(0.1)),
}
HOW = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
