"""Layers: each module with parameters of its own is a unit."""

from __future__ import annotations

import torch
from torch import nn

from lightning_mat.units import partition


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(3))
        self.embed = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(2)
        )
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embed.weight


def test_every_module_with_parameters_is_a_unit_of_the_block_around_it():
    part = partition(Net(), "layers")
    assert list(zip(part.names, part.layers, part.numel.tolist(), strict=True)) == [
        ("Net", "", 3),
        ("embed", "", 28),
        ("blocks.0.0", "blocks.0", 8),
        ("blocks.0.1", "blocks.0", 20),
        ("blocks.1.0", "blocks.1", 8),
        ("blocks.1.1", "blocks.1", 20),
        ("head", "", 7),
    ]
    assert set(part.kinds) == {"layer"}
    assert part.remainder == ()


def test_layers_take_what_other_rules_leave():
    model = nn.TransformerEncoderLayer(8, 2, 16)
    part = partition(model, "layers+heads+ffn")
    assert part.remainder == ()
    assert part.kinds == ("head",) * 2 + ("ffn",) * 4 + ("layer",) * 4
    assert part.names[-4:] == ("self_attn.out_proj", "linear2", "norm1", "norm2")


def test_a_single_layer_is_named_by_its_type():
    assert partition(nn.Linear(2, 2)).names == ("Linear",)
