"""The memory of a partly resting gradient: written where it trains, never stale where it rests."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from examples.models.bert import Bert, preset
from lightning_mat.gate import Gate
from lightning_mat.gate.buffer import GradientBuffer
from lightning_mat.units import partition
from lightning_mat.units.core import Partition
from lightning_mat.units.unit import Slice, Unit
from tests.gate.cases import even, rows

X = torch.linspace(-1, 1, 5 * 4, dtype=torch.float64).view(5, 4)


def gated() -> tuple[nn.Linear, Gate]:
    torch.manual_seed(0)
    model = nn.Linear(4, 6).double()
    gate = Gate(model, Partition(rows("weight", even(6, 3)), model))
    gate.apply([True, False, True])
    return model, gate


def backward(model: nn.Module, scale: float = 1.0) -> Tensor:
    (scale * model(X).square()).sum().backward()
    return model.weight.grad


def test_a_gradient_is_allocated_once():
    model, _ = gated()
    addresses = set()
    for _ in range(3):
        model.weight.grad = None
        addresses.add(backward(model).data_ptr())
    assert len(addresses) == 1


def test_a_gradient_that_somebody_keeps_is_left_alone():
    model, _ = gated()
    kept = backward(model)
    before = kept.clone()
    model.weight.grad = None
    second = backward(model, 2.0)
    assert second.data_ptr() != kept.data_ptr()
    assert torch.equal(kept, before)
    torch.testing.assert_close(second, 2 * before)


def test_gradients_accumulate():
    model, _ = gated()
    once = backward(model).clone()
    twice = backward(model)
    torch.testing.assert_close(twice, 2 * once)
    model.zero_grad(set_to_none=False)
    torch.testing.assert_close(backward(model), once)


def test_what_somebody_wrote_where_it_rests_is_gone_in_the_next_step():
    model, _ = gated()
    backward(model).add_(1.0)
    model.weight.grad = None
    again = backward(model)
    assert not again[2:4].any()
    assert again[:2].all()


def test_a_clipped_gradient_does_not_leak_into_the_next():
    model, _ = gated()
    expected = backward(model).clone()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    model.weight.grad = None
    torch.testing.assert_close(backward(model), expected)


def test_a_gradient_asked_for_in_between_does_not_hide_what_somebody_wrote():
    model, _ = gated()
    backward(model).add_(1.0)
    torch.autograd.grad(model(X).square().sum(), model.weight)
    model.weight.grad = None
    assert not backward(model)[2:4].any()


def test_the_packed_gradient_of_attention_is_allocated_once():
    model = nn.MultiheadAttention(8, 2)
    units = [
        Unit(f"head.{h}", "head", "", tuple(Slice("in_proj_weight", 0, i, i + 4) for i in starts))
        for h, starts in enumerate([(0, 8, 16), (4, 12, 20)])
    ]
    Gate(model, Partition(units, model)).apply([True, False])
    x = torch.randn(3, 2, 8)
    addresses = set()
    for _ in range(3):
        model.zero_grad()
        model(x, x, x)[0].sum().backward()
        addresses.add(model.in_proj_weight.grad.data_ptr())
    assert len(addresses) == 1


@pytest.mark.parametrize("build", [lambda: nn.Linear(4, 6), lambda: nn.MultiheadAttention(4, 2)])
def test_a_removed_gate_holds_no_memory(build):
    gc.collect()
    model = build()
    name = next(name for name, _ in model.named_parameters())
    gate = Gate(model, Partition(rows(name, even(6, 3)), model))
    gate.apply([True, False, True])
    x = torch.randn(2, 1, 4)
    (model(x, x, x)[0] if isinstance(model, nn.MultiheadAttention) else model(x)).sum().backward()
    buffers = [b for b in gc.get_objects() if type(b) is GradientBuffer and b._kept is not None]
    references = [weakref.ref(b) for b in buffers]
    del buffers
    assert references
    gate.remove()
    model.zero_grad()
    gc.collect()
    assert not any(reference() for reference in references)


class Operations(TorchDispatchMode):
    """Notes the names of all operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("skip", ["weights", "units"])
def test_no_step_waits_for_a_device_or_builds_an_index(skip):
    """Neither reads a value on the host nor makes a tensor of host values."""
    model = Bert(preset("tiny", vocab_size=20, max_length=8))
    part = partition(model, "heads+ffn")
    words = torch.arange(16).view(2, 8)

    def operations() -> set[str]:
        with Operations() as seen:
            model(words).sum().backward()
        return seen.names

    plain = operations()
    with Gate(model, part, skip=skip) as gate:
        gate.apply([i % 2 == 0 for i in range(len(part))])
        operations()  # the first looks at what it drops
        gate.apply([i % 3 == 0 for i in range(len(part))])
        more = operations() - plain
    waiting = {"item", "_local_scalar_dense", "nonzero", "unique", "lift_fresh", "masked_select"}
    assert {name.removeprefix("aten::") for name in more}.isdisjoint(waiting)
    assert "aten::mm" in plain
