"""Every refusal says what was wrong, what was found, and what to do."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adafactor, Adam, Muon, Optimizer, SparseAdam

from lightning_mat import MAT
from lightning_mat.optim import MATOptimizer
from lightning_mat.optim import optimizer as module
from lightning_mat.units.core import Partition
from lightning_mat.units.unit import Slice, Unit
from tests.optim.cases import Model, units_of


def rows(model: nn.Module, count: int = 2) -> Partition:
    slices = [Slice("weight", 0, i, i + 1) for i in range(count)]
    return Partition([Unit(f"row.{i}", "ffn", "", (s,)) for i, s in enumerate(slices)], model)


class RowNorm(SGD):
    """A subclass with an update of its own."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.data -= param.grad / param.grad.norm()


@pytest.mark.parametrize("make", [LBFGS, Muon, Adafactor, SparseAdam, partial(RowNorm, lr=0.1)])
def test_an_update_that_is_not_elementwise_is_refused_by_name(make: Any) -> None:
    model = nn.Linear(3, 2, bias=False)
    inner = make(model.parameters())
    name = type(inner).__name__
    with pytest.raises(TypeError, match=rf"{name} is not known.*SGD, Adam.*elementwise\({name}\)"):
        MATOptimizer(inner, model, rows(model))


def test_a_subclass_without_a_step_of_its_own_is_as_elementwise_as_its_base() -> None:
    class Mine(Adam):
        pass

    model = nn.Linear(3, 2, bias=False)
    MATOptimizer(Mine(model.parameters()), model, rows(model))


class SignSGD(Optimizer):
    """Elementwise, with state that replaces its tensors instead of writing to them."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    state = self.state[param]
                    state["count"] = state.get("count", 0) + 1
                    state["sum"] = state.get("sum", 0) + param.grad
                    param -= group["lr"] * state["sum"].sign() / state["count"]
        return loss


def test_an_optimizer_of_your_own_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ELEMENTWISE", list(module._ELEMENTWISE))
    model = nn.Linear(1, 2, bias=False)
    inner = SignSGD(model.parameters())
    with pytest.raises(TypeError, match="SignSGD"):
        MATOptimizer(inner, model, rows(model))
    assert MATOptimizer.register_elementwise(SignSGD) is SignSGD
    MATOptimizer.register_elementwise(SignSGD)
    optimizer = MATOptimizer(inner, model, rows(model))
    nn.init.zeros_(model.weight)
    model.weight.grad = torch.ones_like(model.weight)
    for active in ([True, False], [True, False], [True, True], [True, True]):
        optimizer.apply(active)
        optimizer.step()
    expected = [0.1 * (1 + 1 / 2 + 1 / 3 + 1 / 4), 0.1 * (1 + 1 / 2)]
    torch.testing.assert_close(-model.weight.flatten(), torch.tensor(expected))
    assert optimizer.state[model.weight]["sum"].flatten().tolist() == [4, 2]
    assert optimizer.state[model.weight]["count"] == 4


class PerRow(SignSGD):
    """Keeps one number per row: not elementwise."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["norms"] = param.grad.norm(dim=1)


def test_state_that_is_not_elementwise_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ELEMENTWISE", [PerRow])
    model = nn.Linear(3, 2, bias=False)
    optimizer = MATOptimizer(PerRow(model.parameters()), model, rows(model))
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    optimizer.apply([True, False])
    with pytest.raises(TypeError, match=r"'weight'.*'norms'.*shape \(2,\)"):
        optimizer.step()


def test_wrapping_twice_is_refused() -> None:
    model = nn.Linear(3, 2, bias=False)
    inner = Adam(model.parameters())
    optimizer = MATOptimizer(inner, model, rows(model))
    for wrapped in (optimizer, inner):
        with pytest.raises(TypeError, match=r"already.*unwrap\(\)"):
            MATOptimizer(wrapped, model, rows(model))
    MATOptimizer(optimizer.unwrap(), model, rows(model))


def test_an_object_without_an_optimizer_has_no_attributes() -> None:
    with pytest.raises(AttributeError, match="defaults"):
        _ = MATOptimizer.__new__(MATOptimizer).defaults


def test_another_model_is_refused() -> None:
    model, other = nn.Linear(3, 2), nn.Linear(4, 2)
    with pytest.raises(ValueError, match=r"'weight' of shape \(2, 3\), the model \(2, 4\)"):
        MATOptimizer(Adam(other.parameters()), other, rows(model))
    with pytest.raises(ValueError, match="the model none"):
        MATOptimizer(Adam(other.parameters()), nn.Sequential(other), rows(model))


def test_a_differentiable_optimizer_is_refused() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="differentiable=False"):
        MATOptimizer(Adam(model.parameters(), differentiable=True), model, rows(model))


@pytest.mark.parametrize("active", [[True], [1.0] * 5, [True] * 6])
def test_flags_must_be_one_bool_per_unit(active: list[Any]) -> None:
    model = Model()
    optimizer = MATOptimizer(Adam(model.parameters()), model, units_of(model))
    with pytest.raises(ValueError, match="bool tensor of shape"):
        optimizer.apply(active)


def test_a_sparse_gradient_of_a_sliced_parameter_is_refused_by_name() -> None:
    model = nn.Embedding(4, 3, sparse=True)
    optimizer = MATOptimizer(SGD(model.parameters(), lr=0.1), model, rows(model))
    model(torch.tensor([1])).sum().backward()
    optimizer.step()  # all active: torch.optim's own business
    optimizer.apply([True, False])
    with pytest.raises(RuntimeError, match="'weight' has a sparse gradient"):
        optimizer.step()
    assert optimizer.param_groups[0]["params"] == [model.weight]


def test_a_sliced_parameter_must_be_a_plain_tensor() -> None:
    class Special(torch.Tensor):
        pass

    model = nn.Linear(3, 2, bias=False)
    model.weight = nn.Parameter(torch.randn(2, 3).as_subclass(Special))
    optimizer = MATOptimizer(Adam(model.parameters()), model, rows(model))
    optimizer.apply([True, False])
    with pytest.raises(TypeError, match="'weight' is a Special"):
        optimizer.step()


class Counted(SGD):
    """Counts its steps, around those of its base, with the closure or behind it."""

    first = False

    def step(self, closure=None):
        self.steps = getattr(self, "steps", 0) + 1
        if self.first and closure is not None:
            closure()
            closure = None
        return super().step(closure)


@pytest.mark.parametrize("closing", [None, "by the base", "before the base"])
def test_a_step_within_a_step_is_one(closing):
    """PyTorch hooks the steps of a class and of its base once a plain one was made."""
    SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    model, twin = nn.Linear(1, 2), nn.Linear(1, 2)
    twin.load_state_dict(model.state_dict())
    units = [
        Unit(f"{i}", "ffn", "fc", (Slice("weight", 0, i, i + 1), Slice("bias", 0, i, i + 1)))
        for i in (0, 1)
    ]
    MATOptimizer.register_elementwise(Counted)
    Counted.first = closing == "before the base"
    inner = Counted(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = MATOptimizer(inner, model, Partition(units, model))
    other = SGD(twin.parameters(), lr=0.1, momentum=0.9)
    optimizer.apply([True, False])

    def gradients(net):
        net.zero_grad()
        net(torch.ones(1)).square().sum().backward()

    for turn in range(4):
        if turn == 2:  # an error ends a step without a word to its hooks
            with pytest.raises(ZeroDivisionError):
                optimizer.step(lambda: 1 / 0)
        if closing is None:
            gradients(model)
            optimizer.step()
        else:
            optimizer.step(lambda: gradients(model))
        gradients(twin)
        other.step()
        assert torch.equal(model.weight[0], twin.weight[0])
        assert optimizer.param_groups[0]["params"][0] is model.weight
    assert not torch.equal(model.weight[1], twin.weight[1])


def test_a_state_that_somebody_empties_begins_anew():
    torch.manual_seed(0)
    model = nn.Linear(1, 2, bias=False)
    units = [Unit(f"{i}", "ffn", "fc", (Slice("weight", 0, i, i + 1),)) for i in (0, 1)]
    optimizer = MATOptimizer(Adam(model.parameters(), lr=0.1), model, Partition(units, model))

    def step():
        model.weight.grad = torch.ones(2, 1)
        before = model.weight.detach().clone()
        optimizer.step()
        return (before - model.weight.detach()).flatten().tolist()

    for empty in (lambda: optimizer.state.clear(), lambda: setattr(optimizer, "state", new())):
        optimizer.apply([True, True])
        step()
        optimizer.apply([True, False])
        for _ in range(5):
            step()
        empty()
        assert step() == pytest.approx([0.1, 0.0])
        optimizer.apply([True, True])
        assert step() == pytest.approx([0.1, 0.1], rel=1e-3)


def new():
    return defaultdict(dict)


def test_an_engine_that_refuses_an_optimizer_lets_go_of_the_others():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    good = Adam(model[0].parameters())
    with pytest.raises(TypeError, match="not known to be elementwise"):
        MAT(model, [good, torch.optim.LBFGS(model[1].parameters())], units="layers")
    MAT(model, good, units="layers").close()
