"""FFN blocks: each unit is a run of hidden neurons, proved by gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_mat.units import FFN, FFNPattern, partition, register_ffn
from lightning_mat.units.ffn import default_width
from lightning_mat.units.patterns import FFN_PATTERNS
from tests.units.architectures import FFNS, Architecture, mixtral, switch
from tests.units.closure import assert_units_are_closed


@pytest.mark.parametrize("case", FFNS, ids=lambda case: case.name)
def test_each_unit_holds_exactly_the_parameters_of_its_neurons(case: Architecture):
    model, run = case.build()
    width = 64 if case.name == "compact-bert" else 5
    part = partition(model, FFN(block_width=width))
    layers = {layer: part.layers.count(layer) for layer in part.layers}
    # A mixture's experts are FFNs too, when nobody asks for experts.
    assert {k: v for k, v in layers.items() if "expert" not in k} == case.layers
    assert set(part.kinds) == {"ffn"}
    for layer in case.layers:
        units = [unit for unit in part if unit.layer == layer]
        assert [u.name for u in units] == [f"{layer}.ffn.{i}" for i in range(len(units))]
        assert_units_are_closed(model, run, units, case.outlet)


class GatedHalves(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Linear(4, 12)
        self.down_proj = nn.Linear(6, 4)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


@pytest.mark.parametrize(
    ("model", "outlet"),
    [
        (GatedHalves(), "down_proj.weight"),
        (nn.Sequential(nn.Linear(4, 12), nn.GLU(), nn.Dropout(0.0), nn.Linear(6, 4)), "3.weight"),
        (nn.Sequential(nn.Linear(4, 6, bias=False), nn.GELU(), nn.Linear(6, 3)), "2.weight"),
    ],
    ids=["gate-and-up-in-one", "sequential-glu", "sequential"],
)
def test_gates_and_sequences_are_taken_apart_by_neuron(model, outlet):
    torch.manual_seed(0)
    model = model.double()
    part = partition(model, FFN(block_width=4))
    assert part.names == ("ffn.0", "ffn.1")
    assert part.remainder == (outlet.replace("weight", "bias"),)
    x = torch.randn(5, 4, dtype=torch.float64)
    assert_units_are_closed(model, lambda m: m(x), list(part), outlet)


def test_the_last_block_has_what_is_left():
    mlp = nn.Sequential(nn.Linear(2, 10), nn.ReLU(), nn.Linear(10, 1))
    part = partition(mlp, FFN(block_width=4))
    assert part.numel.tolist() == [4 * 4, 4 * 4, 2 * 4]
    assert partition(mlp, FFN(block_width=99)).names == ("ffn.0",)


@pytest.mark.parametrize("hidden", [1, 3, 4, 100, 512, 1000, 3072, 11008])
def test_default_blocks_are_between_64_and_128_wide_or_a_quarter(hidden):
    width = default_width(hidden)
    assert 64 <= width <= 128 or (width < 64 and width == -(-hidden // 4))


def test_experts_come_first_and_their_linears_are_left_to_them():
    for build in (switch, mixtral):
        model, _ = build()
        part = partition(model, "ffn+experts" if build is switch else "experts+heads")
        owners = {
            part.units[i].kind for n in part.owners if "experts" in n for i, _ in part.owners[n]
        }
        assert owners == {"expert"}
    model, _ = switch()
    together = partition(model, [FFN(), "experts"])
    assert set(together.kinds) == {"expert", "ffn"}
    assert not [u for u in together if u.kind == "ffn" and "experts" in u.slices[0].param]


def test_widths_that_do_not_fit_are_no_network():
    model = nn.Module()
    model.fc1, model.fc2 = nn.Linear(4, 6), nn.Linear(7, 4)
    with pytest.raises(ValueError, match="found no ffn in Module"):
        partition(model, "ffn")


def test_two_networks_in_one_block_are_two_layers():
    block = nn.ModuleDict({n: nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)) for n in "ab"})
    part = partition(nn.ModuleList([block]), FFN(block_width=4))
    assert part.names == ("0.a.ffn.0", "0.a.ffn.1", "0.b.ffn.0", "0.b.ffn.1")


def test_registered_names_are_recognised():
    before = FFN_PATTERNS.copy()
    model = nn.ModuleDict({"grow": nn.Linear(4, 8), "shrink": nn.Linear(8, 4)})
    try:
        register_ffn(FFNPattern(("grow",), "shrink"))
        assert len(partition(model, FFN(block_width=2))) == 4
    finally:
        FFN_PATTERNS[:] = before


@pytest.mark.parametrize("width", [0, -1, 2.5, True, "64"])
def test_block_width_must_be_a_positive_integer(width):
    with pytest.raises(ValueError, match="block_width must be an integer ≥ 1"):
        FFN(block_width=width)
