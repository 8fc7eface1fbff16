"""Small models of every architecture, with a batch each: the shared table of the probe's tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mat.units import Partition, Slice, Unit


@dataclass(frozen=True)
class Case:
    """A model in eval mode, a batch, and the logits [S, ...] that the mNTK is made of."""

    model: nn.Module
    batch: Any
    logits: Callable[[nn.Module], Tensor]


def parameter_units(model: nn.Module) -> Partition:
    """Return a partition with one unit per parameter."""
    return Partition([Unit(n, "layer", n, (Slice(n),)) for n, _ in model.named_parameters()], model)


def mlp() -> Case:
    model = nn.Sequential(
        nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(7, 6), nn.Linear(6, 4)
    )
    x = torch.randn(9, 5)
    return Case(model, (x, torch.zeros(9, dtype=torch.long)), lambda m: m(x.to(_dtype(m))))


def tokens() -> Case:
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3), nn.RMSNorm((3,)))
    x = torch.randn(4, 4, 5)
    return Case(model, x, lambda m: m(x.to(_dtype(m))))


def convolutions() -> Case:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, stride=2, padding=2, dilation=2, groups=4),
        nn.GroupNorm(2, 8),
        nn.Conv2d(8, 8, 3, groups=8, bias=False),
        nn.Conv2d(8, 6, 2, padding="same", padding_mode="circular"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )
    x = torch.randn(5, 3, 12, 11)
    return Case(model, {"input": x}, lambda m: m(x.to(_dtype(m))))


def conv1d() -> Case:
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Conv1d(4, 4, 3, groups=4), nn.Flatten())
    x = torch.randn(4, 3, 12)
    return Case(model, x, lambda m: m(x.to(_dtype(m))))


def conv3d() -> Case:
    model = nn.Sequential(
        nn.Conv3d(2, 4, 2),
        nn.InstanceNorm3d(4, affine=True),
        nn.Conv3d(4, 2, (1, 2, 2), stride=2),
        nn.Flatten(),
    )
    x = torch.randn(4, 2, 6, 5, 6)
    return Case(model, x, lambda m: m(x.to(_dtype(m))))


class Encoder(nn.Module):
    """``nn.TransformerEncoder`` over token embeddings, tied to the output, in both layouts."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
        self.batch_first = batch_first
        self.embed = nn.Embedding(11, 8, padding_idx=0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(8, 11)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x if self.batch_first else x.T)
        h = self.out(self.encoder(h))
        return h if self.batch_first else h.transpose(0, 1)


def encoder(batch_first: bool) -> Case:
    x = torch.randint(0, 11, (6, 6))  # as many tokens as samples: shapes alone cannot tell
    return Case(Encoder(batch_first), x, lambda m: m(x))


class Crossed(nn.Module):
    """Attention with other keys and values, their own widths, and a padding mask."""

    def __init__(self, kdim: int | None) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=kdim, vdim=kdim, batch_first=True)
        self.kdim = kdim or 8

    def forward(self, x: Tensor) -> Tensor:
        memory = x[:, :3, : self.kdim].tanh()
        padding = x[:, :3, 0] > 0.5
        padding[:, 0] = False
        return self.attention(x, memory, memory, key_padding_mask=padding)[0]


def crossed(kdim: int | None) -> Case:
    x = torch.randn(3, 5, 8)
    return Case(Crossed(kdim), x, lambda m: m(x.to(_dtype(m))))


class Recurrent(nn.Module):
    """A layer without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x.transpose(0, 1))[0]).transpose(0, 1)


def recurrent() -> Case:
    x = torch.randn(4, 7, 5)
    return Case(Recurrent(), x, lambda m: m(x.to(_dtype(m))))


class Shared(nn.Module):
    """One layer called twice, and merged rows: samples and tokens in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.bilinear = nn.Bilinear(6, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x.reshape(-1, 6)).tanh()
        h = self.layer(h)
        return self.bilinear(h, h).view(x.shape[0], -1)


def shared() -> Case:
    x = torch.randn(5, 4, 6)
    return Case(Shared(), x, lambda m: m(x.to(_dtype(m))))


class Mixture(nn.Module):
    """Top-1 routing: an expert sees some tokens of some samples, in no regular order."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 6)
        self.router = nn.Linear(6, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6)) for _ in range(3)
        )
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x).tanh()
        flat = h.reshape(-1, 6)
        weight, choice = self.router(flat).softmax(-1).max(-1)
        y = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            rows = (choice == i).nonzero().squeeze(1)
            y = y.index_put((rows,), expert(flat[rows]) * weight[rows].unsqueeze(1))
        return self.out(y.view_as(h) + h)


def mixture() -> Case:
    x = torch.randn(7, 10, 5)
    return Case(Mixture(), x, lambda m: m(x.to(_dtype(m))))


CASES: dict[str, Callable[[], Case]] = {
    "mlp": mlp,
    "tokens": tokens,
    "conv2d": convolutions,
    "conv1d": conv1d,
    "conv3d": conv3d,
    "encoder": lambda: encoder(True),
    "encoder_time_first": lambda: encoder(False),
    "cross_attention": lambda: crossed(None),
    "cross_attention_widths": lambda: crossed(6),
    "recurrent": recurrent,
    "shared": shared,
    "mixture": mixture,
}


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype
