"""What the kernel's benchmark runs on: layers' inputs and output gradients of real models' shapes.

Every workload is a function that draws one input set (a, b, plan): a fresh one in each call, all of
it random. Layers' inputs are normal around a direction that all tokens share, as activations are,
so that λ_max stands out; inputs of convolutions are what a ReLU leaves. A set holds as many tensors
as the model's backward pass would: nothing is shared between layers but what a model shares (one
input for query, key and value; one gradient for a layer's weight and its bias).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_mat.mntk.kernel import Geometry, Layer, Plan
from lightning_mat.units.unit import Rect

Owned = list[tuple[int, Rect]]


class Inputs(NamedTuple):
    """One input set: a layer's input, its output gradient and its part of the plan, per parameter.

    ``bytes`` counts what the tensors hold, a tensor that several parameters use once.
    """

    a: list[Tensor]
    b: list[Tensor]
    plan: Plan

    @property
    def bytes(self) -> int:
        storages = (tensor.untyped_storage() for tensor in (*self.a, *self.b))
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

    def to(self, device: torch.device | str) -> Inputs:
        return Inputs([x.to(device) for x in self.a], [g.to(device) for g in self.b], self.plan)


class Workload(NamedTuple):
    """A function that draws, and its sizes where it is measured and where it is only tried out."""

    draw: Callable[..., Inputs]
    cpu: dict[str, int]
    cuda: dict[str, int]
    quick: dict[str, int]


class Pass:
    """Collects what a backward pass captured, parameter by parameter."""

    def __init__(self, samples: int, device: torch.device | str) -> None:
        self.samples, self.device = samples, device
        self.layers: list[Layer] = []
        self.a: list[Tensor] = []
        self.b: list[Tensor] = []

    def inputs(self, tokens: int, width: int) -> Tensor:
        """[S, T, width], normal around a direction."""
        direction = torch.randn(width, device=self.device)
        return torch.randn(self.samples, tokens, width, device=self.device).add_(direction)

    def gradients(self, *shape: int) -> Tensor:
        """[S, *shape], normal."""
        return torch.randn(self.samples, *shape, device=self.device)

    def linear(self, x: Tensor, g: Tensor, owned: Owned, *, bias: bool = False) -> None:
        """A weight [rows, columns], and a bias whose rows belong to the same units."""
        rows, columns = g.shape[2], x.shape[2]
        self._add(Layer("linear", rows, columns, owned), x, g)
        if bias:
            self.bias(g, owned)

    def conv(self, x: Tensor, g: Tensor, owned: Owned, kernel: int) -> None:
        """A weight [filters, channels · kernel²] and its bias."""
        rows, channels = g.shape[1], x.shape[1]
        geometry = Geometry((kernel, kernel), (1, 1), (1, 1), (1, 1))
        layer = Layer("conv", rows, channels * kernel**2, owned, geometry=geometry)
        self._add(layer, x, g)
        self.bias(_tokens(g), owned)

    def affine(self, normal: Tensor, g: Tensor, owned: Owned) -> None:
        """A norm's weight and bias, one each per channel; normal is the normalised input."""
        self._add(Layer("scale", g.shape[1], 1, _first_column(owned)), _tokens(normal), _tokens(g))
        self.bias(_tokens(g), owned)

    def bias(self, g: Tensor, owned: Owned) -> None:
        """[rows], from gradients [S, T, rows]."""
        self._add(Layer("bias", g.shape[2], 1, _first_column(owned)), g.new_empty(0), g)

    def done(self, units: int) -> Inputs:
        return Inputs(self.a, self.b, Plan(units=units, layers=self.layers))

    def _add(self, layer: Layer, a: Tensor, b: Tensor) -> None:
        self.layers.append(layer)
        self.a.append(a)
        self.b.append(b)


def bert(
    device: str, *, layers: int, samples: int, tokens: int, hidden: int = 768, ffn: int = 0
) -> Inputs:
    """Encoder layers: heads own 64 rows of query, key, value and 64 columns of out; ffn blocks."""
    made = Pass(samples, device)
    heads = hidden // 64
    for unit in range(0, layers * (heads + ffn), heads + ffn):
        x = made.inputs(tokens, hidden)
        for _ in ("query", "key", "value"):
            made.linear(
                x, made.gradients(tokens, hidden), _rows(unit, heads, 64, hidden), bias=True
            )
        out = _columns(unit, heads, 64, hidden)
        made.linear(made.inputs(tokens, hidden), made.gradients(tokens, hidden), out)
        if ffn:
            unit, wide = unit + heads, 4 * hidden
            x, g = made.inputs(tokens, hidden), made.gradients(tokens, wide)
            made.linear(x, g, _rows(unit, 1, wide, hidden), bias=True)
            x, g = made.inputs(tokens, wide), made.gradients(tokens, hidden)
            made.linear(x, g, _columns(unit, 1, wide, hidden))
    return made.done(layers * (heads + ffn))


# Filters per convolution of VGG16 and how often the image was halved before it.
VGG16 = [(64, 0)] * 2 + [(128, 1)] * 2 + [(256, 2)] * 3 + [(512, 3)] * 3 + [(512, 4)] * 3


def vgg(device: str, *, samples: int, layers: int = len(VGG16), size: int = 32) -> Inputs:
    """VGG16 on small images: filters own their weights, their bias and their norm's affine."""
    made = Pass(samples, device)
    channels, unit = 3, 0
    for filters, halved in VGG16[:layers]:
        side = size >> halved
        owned = _rows(unit, filters, 1, channels * 9)
        x = made.gradients(channels, side, side).relu_()
        made.conv(x, made.gradients(filters, side, side), owned, kernel=3)
        # Two more tensors: what the norm passes back differs from what it receives.
        normal, g = made.gradients(filters, side, side), made.gradients(filters, side, side)
        made.affine(normal, g, owned)
        channels, unit = filters, unit + filters
    return made.done(unit)


def switch(
    device: str, *, samples: int, tokens: int, layers: int, experts: int = 8, width: int = 768
) -> Inputs:
    """Switch Transformer: each token goes to one expert, so that every expert has its own T.

    An expert's tokens lie at the front of [S, T_e, ·], where T_e is its longest sample's count;
    behind a shorter sample's tokens are zeros.
    """
    made = Pass(samples, device)
    for unit in range(0, layers * experts, experts):
        # Routers are never even: the logits of some experts are higher everywhere.
        logits = torch.randn(samples, tokens, experts) + 0.5 * torch.randn(experts)
        route = logits.argmax(-1)
        for expert in range(experts):
            counts = (route == expert).sum(1)
            length = max(1, int(counts.max()))
            used = (torch.arange(length) < counts[:, None]).unsqueeze(-1).to(device)
            x = made.inputs(length, width) * used
            h = made.inputs(length, 4 * width).relu_() * used
            inner, outer = made.gradients(length, 4 * width), made.gradients(length, width)
            made.linear(x, inner * used, _rows(unit + expert, 1, 4 * width, width))
            made.linear(h, outer * used, _rows(unit + expert, 1, width, 4 * width))
    return made.done(layers * experts)


def llama(
    device: str, *, samples: int, tokens: int, width: int = 4096, heads: int = 32, ffn: int = 11008
) -> Inputs:
    """One layer of Llama 7B: heads of 128 rows and columns, and the gated block as one unit."""
    made = Pass(samples, device)
    size = width // heads
    x = made.inputs(tokens, width)
    for _ in ("query", "key", "value"):
        made.linear(x, made.gradients(tokens, width), _rows(0, heads, size, width))
    out = _columns(0, heads, size, width)
    made.linear(made.inputs(tokens, width), made.gradients(tokens, width), out)
    x = made.inputs(tokens, width)
    for _ in ("gate", "up"):
        made.linear(x, made.gradients(tokens, ffn), _rows(heads, 1, ffn, width))
    down = _columns(heads, 1, ffn, width)
    made.linear(made.inputs(tokens, ffn), made.gradients(tokens, width), down)
    return made.done(heads + 1)


def mlp(device: str, *, samples: int, layers: int, width: int) -> Inputs:
    """T = 1: hidden layers of a multilayer perceptron, each a unit with its bias."""
    made = Pass(samples, device)
    for unit in range(layers):
        g = made.gradients(1, width)
        made.linear(made.inputs(1, width), g, _rows(unit, 1, width, width), bias=True)
    return made.done(layers)


# Sizes on the CPU are counted to take some seconds per call on two cores: fewer layers, samples or
# tokens than on a GPU where the full size would take longer.
WORKLOADS = {
    "bert-heads-128": Workload(
        bert,
        cpu={"layers": 12, "samples": 64, "tokens": 128},
        cuda={"layers": 12, "samples": 64, "tokens": 128},
        quick={"layers": 2, "samples": 5, "tokens": 7, "hidden": 128},
    ),
    "bert-heads-512": Workload(
        bert,
        cpu={"layers": 6, "samples": 64, "tokens": 512},
        cuda={"layers": 12, "samples": 64, "tokens": 512},
        quick={"layers": 1, "samples": 3, "tokens": 20, "hidden": 128},
    ),
    "bert-heads-ffn-128": Workload(
        bert,
        cpu={"layers": 4, "samples": 64, "tokens": 128, "ffn": 1},
        cuda={"layers": 12, "samples": 64, "tokens": 128, "ffn": 1},
        quick={"layers": 2, "samples": 5, "tokens": 7, "hidden": 128, "ffn": 1},
    ),
    "vgg-filters": Workload(
        vgg, cpu={"samples": 64}, cuda={"samples": 64}, quick={"layers": 2, "samples": 4, "size": 8}
    ),
    "switch-experts": Workload(
        switch,
        cpu={"samples": 64, "tokens": 128, "layers": 1},
        cuda={"samples": 64, "tokens": 128, "layers": 6},
        quick={"samples": 4, "tokens": 9, "layers": 2, "experts": 3, "width": 12},
    ),
    "llama-layer": Workload(
        llama,
        cpu={"samples": 16, "tokens": 64},
        cuda={"samples": 64, "tokens": 128},
        quick={"samples": 4, "tokens": 5, "width": 32, "heads": 4, "ffn": 44},
    ),
    "mlp": Workload(
        mlp,
        cpu={"samples": 64, "layers": 3, "width": 2048},
        cuda={"samples": 64, "layers": 3, "width": 2048},
        quick={"samples": 6, "layers": 3, "width": 33},
    ),
}


def _rows(unit: int, count: int, size: int, columns: int) -> Owned:
    """Units, from ``unit`` on, that own ``size`` rows each."""
    return [(unit + i, Rect(i * size, (i + 1) * size, 0, columns)) for i in range(count)]


def _columns(unit: int, count: int, size: int, rows: int) -> Owned:
    """Units, from ``unit`` on, that own ``size`` columns each."""
    return [(unit + i, Rect(0, rows, i * size, (i + 1) * size)) for i in range(count)]


def _first_column(owned: Iterable[tuple[int, Rect]]) -> Owned:
    """The same rows of a vector."""
    return [(unit, Rect(r.r0, r.r1, 0, 1)) for unit, r in owned]


def _tokens(images: Tensor) -> Tensor:
    """[S, C, *size] → [S, T, C], a view."""
    return images.flatten(2).transpose(1, 2)
