"""Transposed convolutions: input and output channels rest, whatever stride, padding and groups."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_mat import flops
from lightning_mat.gate import Gate
from lightning_mat.gate.rules import Rest
from lightning_mat.gate.transposed import transposed_gradients, transposed_rule
from lightning_mat.units.core import Partition
from lightning_mat.units.regions import Block
from lightning_mat.units.unit import Slice
from tests.gate.cases import SavedBytes, assert_close, check, even, rows, some, unit

GEOMETRIES = {
    "plain": {},
    "stride": {"stride": 2, "padding": 1, "output_padding": 1},
    "dilation": {"dilation": 2, "padding": (1, 2), "bias": False},
    "groups": {"groups": 2, "stride": (1, 2)},
}
PATTERNS = {
    "input channels": lambda n, m: rows("weight", even(n, n)),
    "output channels": lambda n, m: rows("weight", even(m, m), dim=1),
    "both of one unit": lambda n, m: [
        unit("other", Slice("weight", 0, 1, 4), Slice("weight", 1, 0, 1))
    ],
    "whole": lambda n, m: [unit("all", Slice("weight"))],
}
SKIPS = pytest.mark.parametrize("skip", ["weights", "units"])


@SKIPS
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradients_are_the_plain_or_the_detached_ones(pattern, geometry, skip):
    for dtype in (torch.float64, torch.float32):
        model = nn.ConvTranspose2d(6, 4, 3, **GEOMETRIES[geometry]).to(dtype)
        x = torch.randn(2, 6, 5, 4, dtype=dtype, requires_grad=True)
        units = PATTERNS[pattern](*model.weight.shape[:2])
        if model.bias is not None:
            units += rows("bias", [(0, 1), (2, 4)])
        for active in ([False] * len(units), some(len(units))):
            gate = check(model, units, active, lambda m, x=x: m(x), [x], skip=skip)
            assert gate.in_full == ()
            gate.remove()


@SKIPS
@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("batched", [True, False])
def test_one_two_and_three_dimensions_batched_or_not(dim, batched, skip):
    kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    model = kinds[dim - 1](6, 3, 2, stride=2).double()
    x = torch.randn(*([2] if batched else []), 6, *[3] * dim, dtype=torch.float64)
    x.requires_grad_()
    check(model, rows("weight", even(3, 3), 1), some(3), lambda m: m(x), [x], skip=skip)


@SKIPS
def test_the_size_of_the_output_may_be_given(skip):
    model = nn.ConvTranspose2d(4, 4, 3, stride=3).double()
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    units = rows("weight", even(4, 4), 1)

    def run(m: nn.Module) -> Tensor:
        return m(x, output_size=[11, 10])

    check(model, units, some(4), run, [x], skip=skip)


@SKIPS
@pytest.mark.parametrize("dim", [0, 1])
def test_operations_are_those_of_what_trains_and_passes(dim, skip):
    model = nn.ConvTranspose2d(4, 4, 3)
    gate = Gate(model, Partition(rows("weight", even(4, 4), dim), model), skip)
    gate.apply([True, False, False, False])
    with flops.count() as counter, SavedBytes(model) as saved:
        model(torch.randn(2, 4, 6, 6, requires_grad=True)).sum().backward()
    full = 2 * 2 * 36 * model.weight.numel()
    assert counter.total == full + full // 4 + (full if skip == "weights" else full // 4)
    assert saved.total == 2 * 36 * 4 * (1 if dim == 0 else 4)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_what_a_compiled_model_calls_gives_the_same_gradients(geometry):
    model = nn.ConvTranspose2d(6, 4, 3, **GEOMETRIES[geometry]).double()
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64, requires_grad=True)
    half = (Block(((1, 2), (4, 6)), ((0, model.weight[0].numel()),)),)
    for rests in ({}, {"weight": Rest(model.weight, half, half)}):
        out = model(x) if not rests else transposed_rule(model, rests)(x)
        grad = torch.randn_like(out)
        wanted = torch.autograd.grad(out, [x, *model.parameters()], grad)
        gradients = transposed_gradients(model, rests)
        needs = (True, True, model.bias is not None)
        found = gradients(grad, x.detach(), model.weight.detach(), model.bias, needs)
        for g, w in zip(found, wanted, strict=False):
            assert_close(g, w, 1e-10)


@SKIPS
def test_a_compiled_model_may_be_given_the_size_of_the_output(skip):
    torch._dynamo.reset()
    model = nn.ConvTranspose2d(4, 4, 3, stride=3).double()
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    part = Partition(rows("weight", even(4, 4), 1), model)

    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m(x, output_size=[11, 10]) + m(x, output_size=[11, 10]).square()

    compiled = torch.compile(run, backend="aot_eager")
    with Gate(model, part, skip) as gate:
        for active in (some(4), some(4, 3)):
            gate.apply(active)
            found = torch.autograd.grad(compiled(model, x).sum(), [x, model.weight])
            wanted = torch.autograd.grad(run(model, x).sum(), [x, model.weight])
            for g, w in zip(found, wanted, strict=True):
                assert_close(g, w, 1e-10)
