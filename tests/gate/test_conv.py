"""Convolutions: filters and input channels rest, whatever stride, padding and groups."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_mat import flops
from lightning_mat.gate import Gate
from lightning_mat.gate.conv import conv_gradients, conv_rule
from lightning_mat.gate.rules import Rest
from lightning_mat.units.core import Partition
from lightning_mat.units.regions import Block
from lightning_mat.units.unit import Slice, Unit
from tests.gate.cases import SavedBytes, assert_close, check, even, rows, some, unit

GEOMETRIES = {
    "plain": {},
    "stride": {"stride": 2, "padding": 1},
    "dilation": {"dilation": 2, "padding": (1, 2)},
    "same": {"padding": "same"},
    "same, even kernel": {"padding": "same", "kernel_size": (2, 3), "dilation": (3, 2)},
    "valid": {"padding": "valid", "bias": False},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "circular": {"padding": (2, 1), "padding_mode": "circular"},
    "pointwise": {"kernel_size": 1},
}


def patterns(out: int, channels: int) -> dict[str, list[Unit]]:
    return {
        "filters": rows("weight", even(out, out)),
        "runs of filters": rows("weight", even(out, 3)),
        "channels": rows("weight", even(channels, channels), dim=1),
        "filters and channels of one unit": [
            unit("other", Slice("weight", 0, 1, 3), Slice("weight", 1, 0, 2))
        ],
        "partly owned": rows("weight", [(2, 5)]),
        "whole": [unit("all", Slice("weight"))],
    }


def with_bias(units: list[Unit]) -> list[Unit]:
    """Let every filter own its entry of the bias as well."""
    return [
        unit(
            u.name, *u.slices, *(Slice("bias", 0, s.start, s.stop) for s in u.slices if s.dim == 0)
        )
        for u in units
    ]


SKIPS = pytest.mark.parametrize("skip", ["weights", "units"])


@SKIPS
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("pattern", patterns(8, 4))
def test_gradients_are_the_plain_or_the_detached_ones(pattern, geometry, skip):
    torch.manual_seed(0)
    options = {"kernel_size": 3, **GEOMETRIES[geometry]}
    units = patterns(8, 4)[pattern]
    for dtype in (torch.float64, torch.float32):
        model = nn.Conv2d(4, 8, **options).to(dtype)
        x = torch.randn(3, 4, 9, 8, dtype=dtype, requires_grad=True)
        owned = units if model.bias is None else with_bias(units)
        for active in ([False] * len(units), some(len(units))):
            gate = check(model, owned, active, lambda m, x=x: m(x), [x], skip=skip)
            assert gate.in_full == ()
            gate.remove()


@SKIPS
@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("batched", [True, False])
def test_one_two_and_three_dimensions_batched_or_not(dim, batched, skip):
    model = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1](3, 6, 2, stride=2).double()
    x = torch.randn(*([2] if batched else []), 3, *[6] * dim, dtype=torch.float64)
    x.requires_grad_()
    check(model, rows("weight", even(6, 6)), some(6), lambda m: m(x), [x], skip=skip)


@SKIPS
@pytest.mark.parametrize(
    ("channels", "out", "groups"), [(4, 8, 2), (6, 6, 6), (4, 12, 4), (6, 9, 3)]
)
def test_groups_of_which_any_number_of_filters_train(channels, out, groups, skip):
    """All groups alike, some with more filters than others, some at rest, one filter alone."""
    generator = torch.Generator().manual_seed(1)
    model = nn.Conv2d(channels, out, 3, padding=1, groups=groups).double()
    x = torch.randn(2, channels, 5, 5, dtype=torch.float64, requires_grad=True)
    units = with_bias(rows("weight", even(out, out)))
    choices = [torch.rand(out, generator=generator) < share for share in (0.2, 0.5, 0.8)]
    choices += [torch.eye(out)[-1].bool(), torch.zeros(out, dtype=torch.bool)]
    for active in choices:
        gate = check(model, units, active.tolist(), lambda m: m(x), [x], skip=skip)
        assert gate.in_full == ()
        gate.remove()


@SKIPS
def test_channels_of_a_grouped_convolution(skip):
    model = nn.Conv2d(6, 8, 3, groups=2).double()
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64, requires_grad=True)
    other = [unit("other", Slice("weight", 0, 3, 6), Slice("weight", 1, 1, 2))]
    for units in (rows("weight", even(3, 3), 1), other):
        for active in (some(len(units)), [False] * len(units)):
            gate = check(model, units, active, lambda m: m(x), [x], skip=skip)
            assert gate.in_full == ()
            gate.remove()


@SKIPS
def test_entries_of_the_bias_rest_alone(skip):
    for groups in (1, 2):
        model = nn.Conv2d(4, 8, 3, groups=groups).double()
        x = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
        check(model, rows("bias", even(8, 4)), some(4), lambda m, x=x: m(x), [x], skip=skip)


def test_complex_weights_get_their_gradient_in_full():
    model = nn.Conv1d(2, 4, 1, dtype=torch.complex64)
    gate = Gate(model, Partition(rows("weight", even(4, 2)), model))
    gate.apply([True, False])
    assert gate.in_full == ("weight",)
    model(torch.randn(3, 2, 5, dtype=torch.complex64)).abs().sum().backward()
    assert not model.weight.grad[2:].any()
    assert model.weight.grad[:2].any()


def test_slices_through_a_kernel_are_left_to_autograd():
    model = nn.Conv2d(2, 3, 3)
    blocks = (Block(((0, 3),), ((0, 13),)),)
    assert conv_rule(model, {"weight": Rest(model.weight, blocks, blocks)}) is None


def test_blocks_with_different_channels_are_separate_convolutions():
    model = nn.Conv1d(5, 8, 2).double()
    blocks = (Block(((0, 2),), ((2, 6),)), Block(((3, 4), (6, 8)), ((0, 2), (4, 10))))
    run = conv_rule(model, {"weight": Rest(model.weight, blocks, blocks)})
    assert run is not None
    x = torch.randn(3, 5, 7).double()
    run(x).square().sum().backward()
    found = model.weight.grad
    model.weight.grad = None
    model(x).square().sum().backward()
    expected = torch.zeros_like(model.weight).view(8, 10)
    for r in itertools.chain(*(block.rects() for block in blocks)):
        part = slice(r.r0, r.r1), slice(r.c0, r.c1)
        expected[part] = model.weight.grad.view(8, 10)[part]
    assert_close(found, expected.view(8, 5, 2), 1e-12)


@SKIPS
def test_channels_last_keeps_outputs_and_gradients(skip):
    model = nn.Conv2d(16, 32, 3, padding=1).to(memory_format=torch.channels_last)
    x = torch.randn(4, 16, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    for width in (1, 8):
        units = with_bias(rows("weight", even(32, 32 // width)))
        check(model, units, some(len(units)), lambda m: m(x), [x], skip=skip).remove()
    Gate(model, Partition(units, model), skip).apply(some(4))
    model(x).sum().backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
    assert model.weight.grad.is_contiguous(memory_format=torch.channels_last)
    address = model.weight.grad.data_ptr()
    model.weight.grad = None
    model(x).sum().backward()
    assert model.weight.grad.data_ptr() == address  # the memory of the step before, not a copy


@SKIPS
@pytest.mark.parametrize("frozen_input", [True, False])
def test_autocast_to_bfloat16_equals_plain_autocast(frozen_input, skip):
    model = nn.Conv2d(4, 16, 3)
    x = torch.randn(2, 4, 8, 8, requires_grad=not frozen_input)

    def run(m: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m(x)

    units = with_bias(rows("weight", even(16, 4)))
    inputs = [] if frozen_input else [x]
    check(model, units, some(4), run, inputs, tolerance=3e-2, skip=skip)


def test_an_inplace_activation_may_follow():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 3)).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    check(
        model, rows("0.weight", even(8, 8)) + rows("2.weight", even(4, 4)), some(12), lambda m: m(x)
    )


CASES = {
    "filters": ({}, rows("weight", even(8, 8))),
    "channels": ({}, rows("weight", even(4, 4), 1)),
    "depthwise": ({"groups": 4}, rows("weight", even(8, 8))),
}


@SKIPS
@pytest.mark.parametrize("case", CASES)
def test_operations_are_those_of_what_trains_and_passes(case, skip):
    options, units = CASES[case]
    model = nn.Conv2d(4, 8, 3, padding=1, **options)
    gate = Gate(model, Partition(units, model), skip)
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    share = len(units) // 4
    for chosen in ([0], [1, 2, 7][: 3 * share]):
        active = [i in chosen for i in range(len(units))]
        gate.apply(active)
        with flops.count() as counter:
            model(x).sum().backward()
        full = 2 * 2 * 36 * model.weight.numel()
        trained = full * sum(active) // len(units)
        assert counter.total == full + trained + (full if skip == "weights" else trained)


@pytest.mark.parametrize(("dim", "channels"), [(0, 4), (1, 1)])
@pytest.mark.parametrize("skip", ["weights", "units"])
def test_saved_bytes_are_those_of_the_channels_that_are_needed(dim, channels, skip):
    model = nn.Conv2d(4, 8, 3)
    units = rows("weight", even(model.weight.shape[dim], 4), dim)
    Gate(model, Partition(units, model), skip).apply([True, False, False, False])
    with SavedBytes(model) as saved:
        model(torch.randn(2, 4, 6, 6))
    assert saved.total == 2 * channels * 36 * 4


def test_filters_that_all_rest_make_a_constant():
    model = nn.Conv2d(4, 8, 3)
    Gate(model, Partition(with_bias(rows("weight", even(8, 8))), model), "units").apply([False] * 8)
    with SavedBytes(model) as saved:
        out = model(torch.randn(2, 4, 6, 6, requires_grad=True))
    assert (out.requires_grad, saved.total) == (False, 0)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_what_a_compiled_model_calls_gives_the_same_gradients(geometry, batched):
    """The gradients' function, which is given the whole input and no padding."""
    model = nn.Conv2d(4, 8, **{"kernel_size": 3, "bias": True, **GEOMETRIES[geometry]}).double()
    x = torch.randn(*([2] if batched else []), 4, 9, 8, dtype=torch.float64, requires_grad=True)
    half = (Block(((1, 2), (4, 7)), ((0, model.weight[0].numel()),)),)
    rest = Rest(model.weight, half, half)
    for rests in ({}, {"weight": rest}):
        out = model(x) if not rests else conv_rule(model, rests)(x)
        grad = torch.randn_like(out)
        wanted = torch.autograd.grad(out, [x, *model.parameters()], grad)
        gradients = conv_gradients(model, rests)
        needs = (True, True, model.bias is not None)
        found = gradients(grad, x.detach(), model.weight.detach(), model.bias, needs)
        for g, w in zip(found, wanted, strict=False):
            assert_close(g, w, 1e-10)


@SKIPS
def test_one_graph_serves_all_decisions(skip):
    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3)).double()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    units = rows("0.weight", even(4, 4)) + rows("2.weight", even(4, 4))
    part = Partition(units, model)
    with Gate(model, part, skip) as gate:
        for turn in range(3):
            active = [i % 3 != turn for i in range(8)]
            gate.apply(active)
            compiled(x).square().sum().backward()
            found = [param.grad for param in model.parameters()]
            model.zero_grad()
            model(x).square().sum().backward()
            for param, grad in zip(model.parameters(), found, strict=True):
                assert_close(grad, param.grad, 1e-10)
            model.zero_grad()
    assert counter.frame_count == 1


@pytest.mark.parametrize("second", [nn.Conv1d(6, 4, 1), nn.ConvTranspose1d(6, 4, 1)])
def test_the_input_may_be_partly_constant(second):
    """Which a linear layer's output is, of whose outputs some rest."""
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), second).double()
    x = torch.randn(3, 6, 8, dtype=torch.float64, requires_grad=True)
    first = [
        unit(f"row.{a}", Slice("0.weight", 0, a, b), Slice("0.bias", 0, a, b))
        for a, b in even(8, 4)
    ]
    units = first + rows("2.weight", even(len(second.weight), 2))
    check(model, units, some(6), lambda m: m(x), [x], skip="units")
