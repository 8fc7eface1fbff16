"""A compiled model: one graph whatever the decision, and the same gradients."""

from __future__ import annotations

import gc
import random

import pytest
import torch
import torch._dynamo.testing
import torch._inductor.config
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

from examples.models.bert import Bert, preset
from lightning_mat.gate import Gate
from lightning_mat.gate.compiled import Gradients, Place
from lightning_mat.units import partition
from lightning_mat.units.core import Partition
from tests.gate.cases import assert_close, even, rows
from tests.reference.gate import detached, expected_gradients

TOKENS = torch.tensor([[5, 1, 9, 4, 4, 7, 0, 2], [3, 3, 8, 6, 1, 0, 2, 5]])
WEIGHTS = torch.linspace(0.5, 2.5, 2 * 8 * 11, dtype=torch.float64).sin().view(2, 8, 11)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small_bert() -> Bert:
    torch.manual_seed(0)
    model = Bert(preset("tiny", vocab_size=11, max_length=8, dropout=0.0)).double()
    for param in model.parameters():
        nn.init.normal_(param, std=0.3)
    return model


def loss_of(model: nn.Module) -> Tensor:
    return (model(TOKENS) * WEIGHTS).sum()


@pytest.mark.parametrize("skip", ["weights", "units"])
def test_a_hundred_decisions_take_one_graph_without_breaks(skip):
    model = small_bert()
    part = partition(model, "heads+ffn")
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    loss_of(compiled).backward()
    assert counter.frame_count == 1
    gate = Gate(model, part, skip=skip)
    draw = random.Random(0)
    for turn in range(100):
        active = [draw.random() < 0.4 for _ in range(len(part))]
        gate.apply(active)
        model.zero_grad()
        loss_of(compiled).backward()
        if turn % 20:
            continue
        found = {name: param.grad for name, param in model.named_parameters()}
        model.zero_grad()
        gate.remove()
        if skip == "weights":
            wanted = expected_gradients(model, part, active, lambda: loss_of(model))
        else:
            with detached(model, part, active):
                wanted = expected_gradients(model, part, active, lambda: loss_of(model))
        for name, grad in found.items():
            if "key.bias" not in name:  # zero but for rounding: softmax does not see it
                assert_close(grad, wanted[name], 1e-10)
    assert counter.frame_count == 2
    gate.apply([True] * len(part))
    loss_of(compiled).backward()
    assert counter.frame_count == 2


def test_the_default_compiler_gives_the_same_gradients():
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)).double()
    part = Partition(rows("0.weight", even(8, 4)) + rows("2.weight", even(8, 4), dim=1), model)
    x = torch.linspace(-1, 1, 30, dtype=torch.float64).view(5, 6)
    compiled = torch.compile(model)
    gate = Gate(model, part)
    for seed in range(3):
        active = [random.Random(seed + i).random() < 0.5 for i in range(len(part))]
        wanted = expected_gradients(model, part, active, lambda: model(x).square().sum())
        gate.apply(active)
        compiled(x).square().sum().backward()
        for name, param in model.named_parameters():
            assert_close(param.grad, wanted[name], 1e-10)
        model.zero_grad()
        gate.remove()


@pytest.mark.parametrize("skip", ["weights", "units"])
def test_a_penalty_on_a_weight_in_the_same_graph_moves_nothing_at_rest(skip):
    """The compiler may add its gradient up in the memory of the layer's, and no version tells."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Conv1d(5, 4, 3)).double()
    part = Partition(rows("0.weight", even(8, 4)) + rows("2.weight", even(4, 2)), model)
    x = torch.linspace(-1, 1, 60, dtype=torch.float64).view(2, 5, 6)

    def loss_of() -> Tensor:
        return model(x).square().sum() + sum(p.square().sum() for p in model.parameters())

    compiled = torch.compile(loss_of)
    with Gate(model, part, skip=skip) as gate:
        gate.apply([True, False, False, True, False, True])
        compiled().backward()
        found = {name: param.grad for name, param in model.named_parameters()}
        model.zero_grad()
        loss_of().backward()
    for name, param in model.named_parameters():
        assert_close(found[name], param.grad, 1e-10)
    assert not found["0.weight"][2:6].any()


@pytest.mark.parametrize("skip", ["weights", "units"])
def test_blocks_that_are_compiled_apart_share_a_graph(skip):
    blocks = nn.ModuleList(
        nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)) for _ in range(12)
    )
    model = nn.Sequential(*blocks).double()
    part = partition(model, "ffn")
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for block in blocks:
        block.compile(backend=counter)
    x = torch.linspace(-1, 1, 30, dtype=torch.float64).view(5, 6).requires_grad_()
    model(x).sum().backward()
    plain = counter.frame_count
    for seed in range(3):  # a gate each
        active = [random.Random(100 * seed + i).random() < 0.5 for i in range(len(part))]
        with Gate(model, part, skip=skip) as gate:
            gate.apply(active)
            model.zero_grad()
            model(x).square().sum().backward()
            found = {name: param.grad for name, param in model.named_parameters()}
            model.zero_grad()
            with torch.compiler.set_stance("force_eager"):
                model(x).square().sum().backward()
        for name, param in model.named_parameters():
            if param.grad is not None:
                assert_close(found[name], param.grad, 1e-10)
    assert counter.frame_count <= plain + 2


class Stem(nn.Module):
    """A convolution in one layout, a linear layer that reads it in another."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")
        self.linear = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x.to(memory_format=torch.channels_last))
        return self.linear(h.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("skip", ["weights", "units"])
def test_the_default_compiler_takes_any_layout(skip):
    model = Stem().double()
    part = Partition(rows("conv.weight", even(8, 4)) + rows("linear.weight", even(6, 3)), model)
    x = torch.linspace(-1, 1, 2 * 3 * 16, dtype=torch.float64).view(2, 3, 4, 4)
    active = [True, False, False, True, True, False, True]
    with Gate(model, part, skip=skip) as gate:
        gate.apply(active)
        torch.compile(model)(x).square().sum().backward()
        found = {name: param.grad for name, param in model.named_parameters()}
        model.zero_grad()
        model(x).square().sum().backward()
    for name, param in model.named_parameters():
        assert_close(found[name], param.grad, 1e-10)


def test_strides_are_what_the_compiler_was_told():
    layer = nn.Linear(6, 8)
    gate = Gate(layer, Partition(rows("weight", even(8, 4)), layer))
    gate.apply([True, False, False, True])
    number = layer.forward.__self__.place.number
    for x in (torch.randn(3, 5, 6), torch.randn(5, 3, 6).transpose(0, 1), torch.randn(3, 6, 5).mT):
        for weight in (layer.weight, layer.weight.detach().T.contiguous().T):
            args = torch.randn(3, 5, 8), x, weight, layer.bias, number, [True] * 3, [6, 1]
            torch.library.opcheck(
                torch.ops.lightning_mat.gated_backward, args, test_utils=("test_faketensor",)
            )


def test_nothing_is_copied_to_another_layout(monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten())
    gate = Gate(
        model, Partition(rows("0.weight", even(16, 4)) + rows("2.weight", even(8, 4)), model)
    )
    gate.apply([True, False] * 4)
    seen = []

    def spy(self: Place) -> Gradients:
        def gradients(grad: Tensor, x: Tensor, weight: Tensor, *rest: object):
            seen.append(x.is_contiguous(memory_format=torch.channels_last))
            return inner(grad, x, weight, *rest)

        inner = original.fget(self)
        return gradients

    original = Place.gradients
    monkeypatch.setattr(Place, "gradients", property(spy))
    with fresh_cache():  # an older graph would say nothing of this one's layouts
        torch.compile(model)(torch.randn(2, 3, 8, 8)).sum().backward()
    # Inductor lays out what the convolutions of a CPU read with channels last.
    wanted = torch._inductor.config.layout_optimization and torch.backends.mkldnn.is_available()
    assert seen == [wanted, wanted]


def test_a_resting_weight_has_no_gradient_and_moves_nothing():
    model = small_bert()
    part = partition(model, "heads")
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    gate = Gate(model, part)
    gate.apply([False] * len(part))
    before = model.layers[0].attention.query.weight.detach().clone()
    loss_of(compiled).backward()
    assert model.layers[0].attention.query.weight.grad is None
    optimizer.step()
    assert torch.equal(model.layers[0].attention.query.weight, before)


def test_a_gate_that_is_gone_before_the_backward_pass_is_named():
    model = nn.Linear(6, 8)
    compiled = torch.compile(model, backend="aot_eager")
    gate = Gate(model, Partition(rows("weight", even(8, 4)), model))
    gate.apply([True, False, False, True])
    out = compiled(torch.randn(2, 6))
    gate.remove()
    del gate
    gc.collect()
    with pytest.raises(RuntimeError, match="keep the Gate"):
        out.sum().backward()
