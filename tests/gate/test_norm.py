"""Normalisation: affine parameters rest, whole and in part, and running statistics with them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_mat.gate import Gate
from lightning_mat.units import partition
from lightning_mat.units.core import Partition
from lightning_mat.units.filters import Filters
from lightning_mat.units.unit import Slice, Unit
from tests.gate.cases import SavedBytes, assert_close, check, even, rows, some, unit

SEQUENCE = torch.linspace(-3, 3, 2 * 5 * 8, dtype=torch.float64).sin().view(2, 5, 8)
IMAGE = torch.linspace(-9, 9, 3 * 6 * 20, dtype=torch.float64).sin().view(3, 6, 5, 4)
NORMS = {
    "layer": (lambda: nn.LayerNorm(8), SEQUENCE),
    "layer over two": (lambda: nn.LayerNorm((5, 8)), SEQUENCE),
    "layer without bias": (lambda: nn.LayerNorm(8, bias=False), SEQUENCE),
    "rms": (lambda: nn.RMSNorm(8), SEQUENCE),
    "group": (lambda: nn.GroupNorm(3, 6), IMAGE),
    "instance": (lambda: nn.InstanceNorm2d(6, affine=True), IMAGE),
    "batch": (lambda: nn.BatchNorm2d(6), IMAGE),
    "batch, no statistics": (lambda: nn.BatchNorm2d(6, track_running_stats=False), IMAGE),
    "batch, tokens": (lambda: nn.BatchNorm1d(8), SEQUENCE[0]),
    "batch, volume": (lambda: nn.BatchNorm3d(6), IMAGE.unsqueeze(-1)),
}
SKIPS = pytest.mark.parametrize("skip", ["weights", "units"])


def patterns(model: nn.Module) -> list[list[Unit]]:
    """Every second channel, with and without its shift; whole; shifts alone."""
    n = len(model.weight)
    alone = rows("weight", even(n, n))
    whole = [unit("whole", Slice("weight"))]
    if getattr(model, "bias", None) is None:
        return [alone, whole]
    both = [unit(u.name, *u.slices, Slice("bias", *_place(u))) for u in alone]
    all_whole = [unit("whole", Slice("weight"), Slice("bias"))]
    return [alone, whole, both, all_whole, rows("bias", even(n, n))]


def _place(u: Unit) -> tuple[int | None, int, int | None]:
    return u.slices[0].dim, u.slices[0].start, u.slices[0].stop


@SKIPS
@pytest.mark.parametrize("name", NORMS)
def test_gradients_are_the_plain_or_the_detached_ones(name, skip):
    build, values = NORMS[name]
    for dtype in (torch.float64, torch.float32):
        for training in (True, False):
            model = build().to(dtype).train(training)
            for param in model.parameters():
                nn.init.normal_(param, 1.0)
            x = values.to(dtype, copy=True).requires_grad_()
            tolerance = 1e-10 if dtype == torch.float64 else 1e-5
            for units in patterns(model):
                for active in (some(len(units) + 1)[1:], [False] * len(units)):
                    gate = check(
                        model, units, active, lambda m, x=x: m(x), [x], tolerance, skip=skip
                    )
                    assert gate.in_full == ()
                    gate.remove()


def network(affine: bool = True, momentum: float | None = 0.1) -> tuple[nn.Module, Partition]:
    """Two convolutions with BatchNorm and an activation in place, and their filters."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(6, 8, 3, bias=False),
        nn.BatchNorm2d(8, momentum=momentum),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 4, 2, bias=False),
        nn.BatchNorm2d(4, momentum=momentum),
        nn.ReLU(inplace=True),
    ).double()
    return model, partition(model, Filters(affine))


@SKIPS
@pytest.mark.parametrize("affine", [True, False])
def test_filters_with_their_norms(affine, skip):
    model, part = network(affine)
    x = IMAGE.clone().requires_grad_()
    for every in (2, 3):
        gate = check(model, part, some(12, every), lambda m: m(x), [x], 1e-9, skip=skip)
        assert gate.in_full == ()
        gate.remove()


def test_only_channels_with_gradients_are_saved():
    model = nn.BatchNorm2d(6)
    units = patterns(model)[2]
    Gate(model, Partition(units, model), "units").apply(some(6))
    with SavedBytes(model) as saved:
        model(IMAGE.float().requires_grad_())
    image = 3 * 3 * 20 * 4
    assert image <= saved.total <= image + 6 * 3 * 4  # and mean, deviation and scale


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", [True, False])
@SKIPS
def test_frozen_statistics_are_those_of_resting_filters_and_no_others(skip, affine, momentum):
    model, part = network(affine, momentum)
    plain = copy.deepcopy(model)
    before = copy.deepcopy(dict(model.named_buffers()))
    active = some(8) + [False] * 4
    with Gate(model, part, skip, freeze_bn=True) as gate:
        gate.apply(active)
        for _ in range(2):
            assert torch.equal(model(IMAGE), plain(IMAGE))  # normalised by the batch as ever
    for (name, found), wanted in zip(model.named_buffers(), plain.buffers(), strict=True):
        if found.dim() == 0:
            assert torch.equal(found, wanted)
            continue
        on = torch.tensor(active[:8] if name.startswith("1") else active[8:])
        assert torch.equal(found, torch.where(on, wanted, before[name]))


def test_statistics_move_by_default_and_without_training_nothing_does():
    model, part = network()
    with Gate(model, part) as gate:
        gate.apply([False] * 12)
        model(IMAGE)
        assert model[1].running_mean.any()
    before = copy.deepcopy(model.state_dict())
    with Gate(model, part, freeze_bn=True) as gate:
        gate.apply([False] * 12)
        assert model.state_dict().keys() == before.keys()
        model.eval()(IMAGE)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_frozen_statistics_leave_gradients_over_two_forwards_alone():
    def loss(m: nn.Module) -> Tensor:
        return m(IMAGE) + m(IMAGE * 2)

    model, part = network()
    x = IMAGE.clone().requires_grad_()
    wanted = torch.autograd.grad(loss(model).square().sum(), list(model.parameters()))
    with Gate(model, part, freeze_bn=True) as gate:
        gate.apply(some(12))
        (loss(model).square().sum() + x.sum() * 0).backward()
    for param, full in zip(model.parameters(), wanted, strict=True):
        live = param.grad != 0
        assert torch.allclose(param.grad[live], full[live], rtol=1e-9, atol=1e-9)


def test_frozen_statistics_need_no_graph_for_each_decision():
    torch._dynamo.reset()
    model, part = network(affine=False)
    before = model[1].running_mean.clone()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with Gate(model, part, freeze_bn=True) as gate:
        for turn in range(4):
            active = [i % 4 != turn for i in range(12)]
            gate.apply(active)
            last = model[1].running_mean.clone()
            compiled(IMAGE).sum().backward()
            moved = model[1].running_mean != last
            assert moved.tolist() == active[:8]
    assert bool((model[1].running_mean != before).all())
    assert counter.frame_count == 1


def test_the_input_may_be_partly_constant():
    """Which a linear layer's output is, of whose outputs some rest."""
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).double().eval()
    x = SEQUENCE[0].clone().requires_grad_()
    units = [
        unit(f"{layer}.{i}", *(Slice(f"{layer}.{p}", 0, i, i + 1) for p in ("weight", "bias")))
        for layer in (0, 1)
        for i in range(8)
    ]
    nn.init.normal_(model[1].weight)
    check(model, units, some(16, 3), lambda m: m(x).sin(), [x], 1e-9, skip="units")


@pytest.mark.parametrize("affine", [True, False])
@SKIPS
def test_one_graph_serves_all_decisions(skip, affine):
    torch._dynamo.reset()
    model, part = network(affine)
    if affine:
        model.append(nn.Flatten()).append(nn.LayerNorm(8)).double()
        part = Partition(
            [*part.units, Unit("norm", "layer", "", (Slice("7.weight"), Slice("7.bias")))], model
        )
    model.eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)

    def gradients(run: nn.Module) -> list[Tensor | None]:
        model.zero_grad()
        run(IMAGE).square().sum().backward()
        return [param.grad for param in model.parameters()]

    with Gate(model, part, skip) as gate:
        for turn in range(6):
            gate.apply([i % 4 != turn % 4 for i in range(12)] + [turn % 2 == 0] * (len(part) - 12))
            for found, wanted in zip(gradients(compiled), gradients(model), strict=True):
                assert_close(found, wanted, 1e-9)
    assert counter.frame_count <= (2 if skip == "units" else 1)
