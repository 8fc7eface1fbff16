"""State goes to checkpoints and back, with MAT or without."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from lightning_mat.optim import MATOptimizer, pieces
from lightning_mat.units.core import Partition
from lightning_mat.units.unit import Slice, Unit
from tests.optim.cases import (
    HOW,
    OPTIMIZERS,
    OTHERS,
    Make,
    Model,
    gradients,
    set_gradients,
    units_of,
)

DECISIONS = [
    [True, False, True, False, False],
    [False, True, True, False, True],
    [True, True, False, True, False],
    [True, True, True, True, True],
]


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        set_gradients(model, gradients(model, torch.Generator().manual_seed(step)))
        if isinstance(optimizer, MATOptimizer):
            optimizer.apply(DECISIONS[step // 2])
        optimizer.step()


@pytest.mark.parametrize("pack_below", [0, 16_384], ids=["views", "packed"])
@pytest.mark.parametrize(
    "make",
    [partial(make, **how) for make in OPTIMIZERS.values() for how in HOW.values()]
    + list(OTHERS.values()),
    ids=[f"{name}-{how}" for name in OPTIMIZERS for how in HOW] + list(OTHERS),
)
def test_a_resumed_run_equals_one_that_was_never_stopped_bit_for_bit(
    make: Make, pack_below: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PACK_BELOW", pack_below)
    model = Model()
    part = units_of(model)
    start = copy.deepcopy(model.state_dict())
    optimizer = MATOptimizer(make(model.parameters()), model, part)
    train(model, optimizer, 0, 8)

    for stop in (1, 3, 4):
        killed = Model()
        killed.load_state_dict(start)
        before = MATOptimizer(make(killed.parameters()), killed, part)
        train(killed, before, 0, stop)
        checkpoint = through_a_file({"model": killed.state_dict(), "opt": before.state_dict()})

        resumed = Model()
        resumed.load_state_dict(checkpoint["model"])
        after = MATOptimizer(make(resumed.parameters()), resumed, part)
        after.load_state_dict(checkpoint["opt"])
        train(resumed, after, stop, 8)
        for name, param in resumed.named_parameters():
            assert torch.equal(param, model.get_parameter(name)), (stop, name)


def test_saving_changes_nothing() -> None:
    for make in OPTIMIZERS.values():
        models = [Model(), Model()]
        models[1].load_state_dict(models[0].state_dict())
        optimizers = [MATOptimizer(make(m.parameters()), m, units_of(m)) for m in models]
        for step in range(8):
            for model, optimizer in zip(models, optimizers, strict=True):
                train(model, optimizer, step, step + 1)
            optimizers[1].state_dict()
        for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_plain_torch_optim_takes_over_at_a_checkpoint(name: str) -> None:
    model, plain_model = Model(), Model()
    make = OPTIMIZERS[name]
    optimizer = MATOptimizer(make(model.parameters()), model, units_of(model))
    train(model, optimizer, 0, 3)
    saved = through_a_file(optimizer.state_dict())
    plain = make(plain_model.parameters())
    plain.load_state_dict(saved)
    assert plain.state_dict().keys() == {"state", "param_groups"}
    train(plain_model, plain, 3, 5)  # it goes on
    layout = {i: {k: v.shape for k, v in s.items()} for i, s in saved["state"].items()}
    shapes = [p.shape for p in plain_model.parameters()]
    assert all(shape in (shapes[i], ()) for i, state in layout.items() for shape in state.values())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_plain_run_is_taken_up_at_a_checkpoint(name: str) -> None:
    plain_model, model = Model(), Model()
    make = OPTIMIZERS[name]
    plain = make(plain_model.parameters())
    train(plain_model, plain, 0, 3)
    model.load_state_dict(plain_model.state_dict())
    optimizer = MATOptimizer(make(model.parameters()), model, units_of(model))
    optimizer.load_state_dict(through_a_file(plain.state_dict()))
    optimizer.apply([True, False, True, False, True])
    for each, opt in ((plain_model, plain), (model, optimizer)):
        set_gradients(each, gradients(each, torch.Generator().manual_seed(9)))
        opt.step()
    # The slabs that train have the moments and the step count of the plain run.
    assert torch.equal(model.rows[:2], plain_model.rows[:2])
    assert torch.equal(model.free, plain_model.free)
    assert not torch.equal(model.rows[2:4], plain_model.rows[2:4])


def test_without_mat_every_slab_takes_the_step_count_of_the_parameter() -> None:
    model = Model()
    optimizer = MATOptimizer(Adam(model.parameters()), model, units_of(model))
    train(model, optimizer, 0, 3)
    saved = optimizer.state_dict()
    assert saved["mat"]["rows"]["history"]["step"].tolist() == [2, 1, 3]
    del saved["mat"]
    optimizer.load_state_dict(saved)
    assert optimizer.state_dict()["mat"] == {}
    optimizer.apply([True] * 5)
    optimizer.step()
    assert optimizer.state[model.rows]["step"] == 4


def test_a_saved_buffer_of_none_is_no_buffer() -> None:
    model = Model()
    make = partial(SGD, lr=0.1, momentum=0.9, dampening=0.5)
    saved = make(model.parameters()).state_dict()
    saved["state"] = {i: {"momentum_buffer": None} for i in saved["param_groups"][0]["params"]}
    optimizer = MATOptimizer(make(model.parameters()), model, units_of(model))
    optimizer.load_state_dict(saved)
    optimizer.apply(DECISIONS[0])
    grads = gradients(model, torch.Generator().manual_seed(0))
    set_gradients(model, grads)
    optimizer.step()
    # The first step copies the gradient, without dampening.
    assert torch.equal(optimizer.state[model.rows]["momentum_buffer"][:2], grads["rows"][:2])


def test_units_in_another_order_find_their_step_counts() -> None:
    def halves(order: tuple[int, int], model: nn.Module) -> Partition:
        rows = [Slice("weight", 0, 2 * i, 2 * i + 2) for i in order]
        return Partition([Unit(f"{r.start}", "ffn", "", (r,)) for r in rows], model)

    model = nn.Linear(2, 4, bias=False)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer = MATOptimizer(Adam(model.parameters()), model, halves((0, 1), model))
    optimizer.step()
    optimizer.apply([True, False])
    optimizer.step()
    other = MATOptimizer(Adam(model.parameters()), model, halves((1, 0), model))
    other.load_state_dict(optimizer.state_dict())
    assert other.state_dict()["mat"]["weight"]["history"]["step"].tolist() == [1, 2]


def test_other_slabs_are_refused_and_nothing_is_loaded() -> None:
    model = nn.Linear(2, 6, bias=False)

    def parts(count: int) -> Partition:
        size = 6 // count
        slices = [Slice("weight", 0, size * i, size * i + size) for i in range(count)]
        return Partition([Unit(str(s.start), "ffn", "", (s,)) for s in slices], model)

    model.weight.grad = torch.ones_like(model.weight)
    optimizer = MATOptimizer(Adam(model.parameters()), model, parts(3))
    optimizer.apply([True, False, False])
    optimizer.step()
    saved = optimizer.state_dict()
    other = MATOptimizer(Adam(model.parameters()), model, parts(2))
    refused = r"other slabs of 'weight'.*on_partition_change=\"map\".*pop\(\"mat\"\)"
    with pytest.raises(ValueError, match=refused):
        other.load_state_dict(saved)
    assert not other.state
    del saved["mat"]
    other.load_state_dict(saved)
    assert other.state[model.weight]["step"] == 1

    whole = Partition([Unit("all", "ffn", "", (Slice("weight"),))], model)
    saved = optimizer.state_dict()
    renamed = {**saved, "mat": {"gone.weight": saved["mat"]["weight"]}}
    with pytest.raises(ValueError, match=r"gone\.weight"):
        MATOptimizer(Adam(model.parameters()), model, whole).load_state_dict(renamed)


def test_the_inner_optimizer_saves_and_loads_too() -> None:
    model = Model()
    inner = Adam(model.parameters())
    optimizer = MATOptimizer(inner, model, units_of(model))
    optimizer.apply(DECISIONS[0])
    set_gradients(model, gradients(model, torch.Generator()))
    optimizer.step()
    optimizer.step()
    saved = copy.deepcopy(inner.state_dict())
    assert saved["state"][0]["step"] == 2
    optimizer.step()
    inner.load_state_dict(saved)
    assert optimizer.state_dict()["mat"] == {}
    assert optimizer.state[model.rows]["step"] == 2


def test_wrapping_a_trained_optimizer_takes_up_its_state() -> None:
    model = Model()
    inner = Adam(model.parameters())
    train(model, inner, 0, 2)
    optimizer = MATOptimizer(inner, model, units_of(model))
    train(model, optimizer, 2, 4)
    assert optimizer.state_dict()["mat"]["rows"]["history"]["step"].tolist() == [2, 4, 4]


def test_unwrapping_leaves_an_ordinary_optimizer() -> None:
    model = Model()
    inner = SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = MATOptimizer(inner, model, units_of(model))
    train(model, optimizer, 0, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    assert optimizer.unwrap() is inner
    assert not inner._optimizer_step_pre_hooks
    assert not inner._optimizer_step_post_hooks
    for index, param in enumerate(model.parameters()):
        if index in saved["state"]:
            expected = saved["state"][index]["momentum_buffer"]
            assert torch.equal(inner.state[param]["momentum_buffer"], expected)
    before = model.whole.detach().clone()
    train(model, inner, 3, 4)
    assert not torch.equal(model.whole, before)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_go_on_like_the_original(how: str) -> None:
    model = Model()
    optimizer = MATOptimizer(Adam(model.parameters()), model, units_of(model))
    train(model, optimizer, 0, 3)
    both = (model, optimizer)
    twin = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    train(model, optimizer, 3, 8)
    train(*twin, 3, 8)
    for ours, theirs in zip(model.parameters(), twin[0].parameters(), strict=True):
        assert ours is not theirs
        assert torch.equal(ours, theirs)
