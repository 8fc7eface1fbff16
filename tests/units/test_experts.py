"""Experts: each unit is one expert, proved by sending all tokens to it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_mat.units import Experts, partition, register_experts
from lightning_mat.units.patterns import EXPERT_CONTAINERS
from tests.units.architectures import mixtral, switch
from tests.units.closure import elements


def _send_all_to(container: nn.Module, expert: int, number: int) -> torch.Tensor:
    """Call the experts of Mixtral or Switch with every token routed to one of them."""
    tokens = torch.linspace(-1, 1, 5 * 8, dtype=torch.float64).sin().view(5, 8)
    ones = torch.ones(5, 1, dtype=torch.float64)
    if isinstance(container, nn.ModuleDict):
        chosen = torch.zeros(5, 1, number, dtype=torch.int64)
        chosen[:, :, expert] = 1
        return container(tokens, chosen, ones)
    return container(tokens, torch.full((5, 1), expert), ones)


@pytest.mark.parametrize(
    ("build", "container", "layer"),
    [
        (switch, "encoder.block.1.layer.1.mlp.experts", "encoder.block.1.layer.1"),
        (mixtral, "model.layers.1.mlp.experts", "model.layers.1"),
    ],
)
def test_each_unit_holds_exactly_the_parameters_of_its_expert(build, container, layer):
    model, _ = build()
    experts = model.get_submodule(container)
    units = [unit for unit in partition(model, "experts") if unit.layer == layer]
    assert [u.name for u in units] == [f"{layer}.expert.{i}" for i in range(3)]
    assert {u.kind for u in units} == {"expert"}
    for i, unit in enumerate(units):
        model.zero_grad(set_to_none=True)
        _send_all_to(experts, i, 3).sin().sum().backward()
        own = elements(model, [unit])
        for name, p in experts.named_parameters(prefix=container):
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            inside = own.get(name, torch.zeros(p.shape, dtype=torch.bool))
            assert not grad[~inside].any(), name
            # A hidden neuron of ReLU may be silent on all tokens.
            assert grad[inside].count_nonzero() > inside.sum() / 2 or not inside.any(), name


def test_routers_and_shared_experts_stay_in_the_remainder():
    for build, router in (
        (switch, "encoder.block.1.layer.1.mlp.router.classifier.weight"),
        (mixtral, "model.layers.0.mlp.gate.weight"),
    ):
        model, _ = build()
        assert router in partition(model, "experts").remainder


class Stacked(nn.Module):
    """[E, …] weights with biases beside them, a router and a shared layer below the container."""

    def __init__(self, number=3):
        super().__init__()
        self.num_experts = number
        self.inner = nn.Module()
        self.inner.weight = nn.Parameter(torch.randn(3, 4, 5))
        self.inner.bias = nn.Parameter(torch.randn(3, 4))
        self.inner.scale = nn.Parameter(torch.randn(4))
        self.router = nn.Linear(4, 3)
        self.shared = nn.Linear(3, 3)


def test_stacked_experts_own_their_slice_and_the_biases_beside_it():
    part = partition(nn.ModuleDict({"experts": Stacked()}), "experts")
    assert part.numel.tolist() == [24, 24, 24]
    assert set(part.remainder) == {
        "experts.inner.scale",
        "experts.router.weight",
        "experts.router.bias",
        "experts.shared.weight",
        "experts.shared.bias",
    }


@pytest.mark.parametrize(
    "container", [Stacked(number=7), nn.Linear(4, 4), nn.ModuleList([nn.ReLU()])]
)
def test_containers_that_hold_no_experts_are_passed_over(container):
    model = nn.ModuleDict({"experts": container, "other": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="found no experts in ModuleDict"):
        partition(model, "experts")


def test_registered_containers_are_recognised():
    before = EXPERT_CONTAINERS.copy()
    model = nn.ModuleDict({"specialists": nn.ModuleList(nn.Linear(2, 2) for _ in range(4))})
    try:
        register_experts("specialists")
        assert len(partition(model, Experts())) == 4
    finally:
        EXPERT_CONTAINERS[:] = before


def test_two_mixtures_in_one_block_are_two_layers():
    mixture = nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(2, 2) for _ in range(2))})
    other = nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(2, 2) for _ in range(2))})
    part = partition(nn.ModuleList([nn.ModuleDict({"a": mixture, "b": other})]), "experts")
    assert part.names == ("0.a.expert.0", "0.a.expert.1", "0.b.expert.0", "0.b.expert.1")
