"""Channels of resting filters have no gradients up to the next convolution, whatever lies between.

Filters own their entries of the BatchNorm behind them here, so that nothing but the next
convolution reads their channels.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_mat import flops
from lightning_mat.gate import Gate
from lightning_mat.gate.partly import Partly
from lightning_mat.units import Filters, partition
from tests.gate.cases import SavedBytes, check
from tests.gate.test_partly import Cube

WIDE = 8
SOME = [[False, True, False, False, True, True, False, False], [False] * 7 + [True]]


class Convolutions(nn.Module):
    """Two convolutions with BatchNorm and anything in between."""

    def __init__(self, between, dim: int = 2, **options) -> None:
        super().__init__()
        conv, norm = getattr(nn, f"Conv{dim}d"), getattr(nn, f"BatchNorm{dim}d")
        self.first = conv(3, WIDE, 3, padding=1, bias=False)
        self.norm = norm(WIDE)
        self.last = conv(WIDE, 4, **{"kernel_size": 3, "padding": 1, "bias": False, **options})
        self.last_norm = norm(4)
        self.between = between
        with torch.no_grad():
            self.norm.weight.uniform_(0.5, 1.5)
            self.norm.bias.uniform_(-0.5, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_norm(self.last(self.between(self.norm(self.first(x)))))


BETWEEN = {
    "nothing": lambda h: h,
    "relu": F.relu,
    "relu in place": nn.ReLU(inplace=True),
    "relu in place, said by position": lambda h: F.relu(h, True),
    "relu in place whose result nobody takes": lambda h: (F.relu(h, inplace=True), h)[1],
    "changed in place, then relu in place": lambda h: F.relu(h.mul_(2), inplace=True),
    "relu in place beside what was computed before": lambda h: (
        (s := h.exp()),
        s + F.relu(h, inplace=True),
    )[1],
    "relu in place, a view before": lambda h: (
        (v := h.transpose(-1, -2)),
        F.relu(h, inplace=True),
        v.transpose(-1, -2).tanh() + h,
    )[-1],
    "relu in place of a view": lambda h: (
        F.relu(h.transpose(-1, -2), inplace=True),
        h.tanh(),
    )[1],
    "a function of one's own behind relu in place": lambda h: (
        F.relu(h, inplace=True),
        Cube.apply(h),
    )[1],
    "a hook behind relu in place": lambda h: (
        F.relu(h, inplace=True),
        h.register_hook(lambda grad: grad * 2),
        h.square(),
    )[-1],
    "hardtanh in place": lambda h: F.relu6(h, inplace=True),
    "dropout of channels": lambda h: F.dropout2d(h, 0.5),
    "dropout": lambda h: F.dropout(F.relu(h), 0.5),
    "max pooling": nn.Sequential(nn.ReLU(inplace=True), nn.MaxPool2d(2)),
    "max pooling with indices": lambda h: F.max_pool2d(h, 3, 1, 1, return_indices=True)[0],
    "average pooling": nn.AvgPool2d(3, stride=2, padding=1),
    "adaptive pooling": nn.AdaptiveAvgPool2d((3, 4)),
    "pooling of pooling": lambda h: F.avg_pool2d(F.max_pool2d(h, 2), 2, ceil_mode=True),
    "mean of positions": lambda h: h.mean((2, 3), keepdim=True) * h,
    "sum of rows": lambda h: h.sum(2)[:, :, None],
    "mean of channels": lambda h: h.mean(1, keepdim=True) + h,
    "mean of all": lambda h: h.mean() * h,
    "another size": lambda h: F.interpolate(h, scale_factor=2),
    "a residual": lambda h: h + h.flip(1),
    "flat and back": lambda h: h.flatten(2).relu().unflatten(2, h.shape[2:]),
    "turned": lambda h: h.transpose(1, 2).relu().transpose(1, 2),
    "a hook on its node": lambda h: (h.grad_fn.register_prehook(doubled), h.exp())[1],
    "its memory through a view, changed behind autograd": lambda h: (
        h.transpose(-1, -2).data.mul_(3),
        F.silu(h),
    )[1],
    "a dimension more in place": lambda h: (h.unsqueeze_(0), h.tanh().view(h.shape[1:]))[1],
    "a mean over a tensor's dimension": lambda h: h + h.mean(torch.tensor(2), keepdim=True),
}


def doubled(grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (grads[0] * 2,)


@pytest.mark.parametrize("active", SOME)
@pytest.mark.parametrize("between", BETWEEN)
def test_anything_between_the_convolutions(between, active):
    torch.manual_seed(0)
    model = Convolutions(BETWEEN[between]).double()
    part = partition(model, Filters(affine=True))
    x = torch.randn(3, 3, 7, 6, dtype=torch.float64, requires_grad=True)
    for others in ([True, False, True, False], [True] * 4):
        check(model, part, [*active, *others], lambda m: m(x), [x], skip="units").remove()


PARTS = {
    "max pooling": nn.MaxPool2d(2),
    "average pooling": nn.AvgPool2d(2),
    "adaptive pooling": nn.AdaptiveAvgPool2d(2),
    "mean": lambda h: h.mean((2, 3)),
    "sum": lambda h: h.sum(3, keepdim=True),
    "batch": lambda h: h.mean(0),
    "flat": lambda h: h.mean((2, 3), keepdim=True).flatten(1),
    "relu6": nn.ReLU6(inplace=True),
    "leaky": nn.LeakyReLU(0.1, inplace=True),
    "hardswish": nn.Hardswish(inplace=True),
    "silu": nn.SiLU(inplace=True),
}


@pytest.mark.parametrize("between", PARTS)
def test_a_part_stays_a_part(between):
    model = Convolutions(PARTS[between])
    _, x = quarter(model)
    hidden = model.norm(model.first(x))
    out = model.between(hidden)
    assert isinstance(out, Partly)
    assert out.apart
    assert out.part.numel() * WIDE == out.numel() * 2
    assert not hidden.watched


OPTIONS = {
    "groups": {"groups": 2},
    "depthwise": {"groups": 4},
    "reflect": {"padding_mode": "reflect"},
    "stride": {"stride": 2},
    "pointwise": {"kernel_size": 1, "padding": 0},
    "same": {"padding": "same"},
    "uneven": {"padding": "same", "kernel_size": (2, 3)},
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
def test_any_convolution_may_follow(option, affine):
    torch.manual_seed(0)
    options = {"kernel_size": 3, "bias": False, **OPTIONS[option]}
    model = Convolutions(nn.ReLU(inplace=True))
    model.last = nn.Conv2d(WIDE, 4, **{"padding": 1, **options})
    model.double()
    part = partition(model, Filters(affine=affine))
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64, requires_grad=True)
    for active in SOME:
        for others in ([False, True, True, False], [True] * 4):
            check(model, part, [*active, *others], lambda m: m(x), [x], skip="units").remove()


@pytest.mark.parametrize("freeze_bn", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_statistics_and_every_number_of_dimensions(dim, training, freeze_bn):
    torch.manual_seed(0)
    pool = getattr(nn, f"MaxPool{dim}d")(2)
    model = Convolutions(nn.Sequential(nn.ReLU(inplace=True), pool), dim, kernel_size=2).double()
    model.train(training)
    part = partition(model, Filters(affine=True))
    x = torch.randn(3, 3, *[5] * dim, dtype=torch.float64, requires_grad=True)
    active = [*SOME[0], True, False, True, True]
    check(model, part, active, lambda m: m(x), [x], skip="units").remove()
    with Gate(model, part, skip="units", freeze_bn=freeze_bn) as gate:
        gate.apply(active)
        before = model.norm.running_mean.clone()
        model(x)
    moved = (model.norm.running_mean != before).tolist()
    assert moved == [training and (on or not freeze_bn) for on in SOME[0]]


def test_images_without_a_batch_and_without_norms():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, WIDE, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(WIDE, 4, 2)
    ).double()
    x = torch.randn(3, 8, 8, dtype=torch.float64, requires_grad=True)
    part = partition(model, "filters")
    for active in SOME:
        check(
            model, part, [*active, True, False, True, True], lambda m: m(x), [x], skip="units"
        ).remove()


def test_autocast_and_channels_last():
    torch.manual_seed(0)
    model = Convolutions(nn.Sequential(nn.ReLU(inplace=True), nn.MaxPool2d(2)))
    model.to(memory_format=torch.channels_last)
    part = partition(model, Filters(affine=True))
    x = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    active = [*SOME[0], True, False, True, True]

    def lowered(m: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m(x).float()

    check(model, part, active, lambda m: m(x), [x], skip="units", exact=False).remove()
    check(model, part, active, lowered, [x], skip="units", tolerance=6e-2, exact=False)


def quarter(model: nn.Module) -> tuple[Gate, Tensor]:
    part = partition(model, Filters(affine=True))
    gate = Gate(model, part, skip="units")
    gate.apply([unit.name.endswith(("filter.0", "filter.4")) for unit in part.units])
    return gate, torch.randn(2, 3, 8, 8)


def test_gradients_stay_a_part_from_convolution_to_convolution():
    model = Convolutions(nn.Sequential(nn.ReLU(inplace=True), nn.MaxPool2d(2)))
    _, x = quarter(model)
    hidden = model.between(model.norm(model.first(x)))
    assert isinstance(hidden, Partly)
    assert hidden.part.shape == (2, 2, 4, 4)
    names, seen = set(), [model.last(hidden).part.grad_fn]
    while seen:
        node = seen.pop()
        names.add(type(node).__name__)
        seen += [n for n, _ in node.next_functions if n is not None]
    assert names.isdisjoint({"MergeBackward", "ReplaceBackward", "TakeBackward"})


def test_operations_and_activations_are_those_of_the_channels_that_train():
    model = nn.Sequential(
        Convolutions(nn.Sequential(nn.ReLU(inplace=True), nn.MaxPool2d(2))), nn.ReLU(inplace=True)
    )
    gate, x = quarter(model)
    with SavedBytes(model) as saved, flops.count() as counter:
        model(x).sum().backward()
    gate.remove()
    pixels = 2 * 64
    first, last = 2 * pixels * 27 * WIDE, 2 * pixels // 4 * 9 * WIDE * 4
    # One of four filters of each layer; the second's gradient goes to a quarter of its inputs.
    assert counter.total == first + last + first // 4 + last // 4 + last // 16
    quarter_map = 4 * pixels * WIDE // 4
    expected = {
        "images": 4 * pixels * 3,
        "the norm's input": quarter_map,
        "relu's output": quarter_map,
        "where the maxima are, int64": 2 * quarter_map // 4,
        "the second convolution's input": 4 * quarter_map // 4,
        "the second norm's input, and relu's output": 2 * 4 * pixels // 4,
    }
    statistics = saved.total - sum(expected.values())
    assert 0 <= statistics < 300, (saved.total, expected)


def test_a_convolution_that_trains_whole_gives_no_gradient_to_resting_channels_either():
    model = Convolutions(nn.ReLU(inplace=True))
    part = partition(model, Filters(affine=True))
    x = torch.randn(2, 3, 8, 8)
    with Gate(model, part, skip="units") as gate:
        gate.apply([unit.layer == "last" or unit.name == "first.filter.3" for unit in part.units])
        for _ in range(2):
            with flops.count() as counter:
                model(x).sum().backward()
            first, last = 2 * 2 * 64 * 27 * WIDE, 2 * 2 * 64 * 9 * WIDE * 4
            assert counter.total == first + last + first // 8 + last + last // 8


@pytest.mark.parametrize("skip", ["weights", "units"])
def test_a_convolution_and_a_norm_that_several_parents_hold(skip):
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)
    for norms in ((norm, norm), (norm, nn.BatchNorm2d(3)), (norm, nn.BatchNorm2d(3, affine=False))):
        model = nn.Sequential(*(nn.Sequential(conv, n, nn.ReLU(inplace=True)) for n in norms))
        model.double()
        x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
        for affine in (False, True):
            part = partition(model, Filters(affine))
            check(model, part, [True, False, True], lambda m, x=x: m(x), [x], skip=skip).remove()
            with Gate(model, part, skip=skip, freeze_bn=True) as gate:
                gate.apply([True, False, True])
                before = norm.running_mean.clone()
                model(x)
            assert (norm.running_mean == before).tolist() == [False, True, False]


class Standardised(nn.Conv2d):
    """A subclass that does something else with its weight."""

    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight - weight.mean((1, 2, 3), keepdim=True), bias)


def test_a_subclass_that_does_something_else_is_computed_in_full_or_refused():
    torch.manual_seed(0)
    model = Standardised(3, 4, 3).double()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    part = partition(model, "filters")
    gate = check(model, part, [True, False, True, False], lambda m: m(x), [x])
    assert set(gate.in_full) == {"weight", "bias"}
    gate.remove()
    with pytest.raises(ValueError, match="register_gate_rule"):
        Gate(model, part, skip="units")


def test_a_compiled_block_that_reads_a_part_has_no_breaks():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, WIDE, 3, bias=False), nn.BatchNorm2d(WIDE), nn.ReLU()),
        nn.Sequential(nn.Conv2d(WIDE, 4, 3), nn.ReLU()),
    ).double()
    counter = CompileCounterWithBackend("aot_eager")
    model[1].compile(backend=counter, fullgraph=True)
    part = partition(model, Filters(affine=True))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    for active in SOME:
        for others in ([False, True, True, False], [True, False, False, False]):
            check(model, part, [*active, *others], lambda m: m(x), [x], skip="units").remove()
    # One for what is no part, as the plain model's, and one for what is.
    assert counter.frame_count <= 2


def test_gradients_of_the_output_may_be_asked_after_it_was_used():
    model = Convolutions(nn.ReLU())
    _, x = quarter(model)
    hidden = model.norm(model.first(x))
    hidden.exp()
    (grad,) = torch.autograd.grad(hidden, model.norm.bias, torch.ones(2, WIDE, 8, 8))
    assert grad.tolist() == [128.0, 0, 0, 0, 128.0, 0, 0, 0]


def test_memory_of_gradients_goes_with_the_gate():
    model = nn.Conv2d(3, WIDE, 3)
    part = partition(model, "filters")
    gc.collect()
    gc.disable()
    try:
        gate = Gate(model, part)
        gate.apply([True] + [False] * (WIDE - 1))
        model(torch.randn(2, 3, 5, 5)).sum().backward()
        hook = next(iter(model.weight._backward_hooks.values()))
        buffer = weakref.ref(hook.buffer)
        del hook
        gate.remove()
        assert buffer() is None
    finally:
        gc.enable()
