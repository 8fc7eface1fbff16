"""A gated module keeps its class, state, hooks and copies; a removed gate leaves nothing."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from lightning_mat.gate import Gate
from lightning_mat.gate.forward import GatedForward
from lightning_mat.units.core import Partition
from lightning_mat.units.unit import Slice
from tests.gate.cases import check, even, rows, unit

X = torch.linspace(-1, 1, 3 * 8).view(3, 8)


class Model(nn.Module):
    """A parameter of its own, a sliced layer and one that rests whole."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        return self.norm(self.fc(x)) * self.scale * factor


def gated() -> tuple[Model, Gate]:
    model = Model()
    units = [*rows("fc.weight", even(8, 4)), *(unit(n, Slice(n)) for n in ("norm.weight", "scale"))]
    gate = Gate(model, Partition(units, model))
    gate.apply([True, False, True, False, False, False])
    return model, gate


def traces(model: nn.Module) -> list[object]:
    found: list[object] = [sorted(m.__dict__) for m in model.modules()]
    for param in model.parameters():
        hooks = (param._backward_hooks, param._post_accumulate_grad_hooks, param.grad)
        found += [hooks, sorted(param.__dict__)]
    return found


def overrides(model: nn.Module) -> list[str]:
    return [path for path, m in model.named_modules() if "forward" in m.__dict__]


def test_a_gate_that_was_not_applied_touches_nothing():
    model = Model()
    before = traces(model)
    Gate(model, Partition(rows("fc.weight", even(8, 4)), model))
    assert traces(model) == before


@pytest.mark.parametrize("how", ["remove", "exit", "all active", "an error"])
def test_nothing_is_left_behind(how):
    plain = traces(Model())
    model, gate = gated()
    assert overrides(model) == ["", "fc", "norm"]
    if how == "remove":
        gate.remove()
    elif how == "all active":
        gate.apply(torch.ones(6, dtype=torch.bool))
    elif how == "exit":
        with gate as same:
            assert same is gate
    else:
        with pytest.raises(ValueError, match="inside"), gate:
            raise ValueError("inside")
    assert traces(model) == plain


def test_class_state_repr_and_hooks_are_kept():
    model, _ = gated()
    plain = Model()
    calls = []
    model.fc.register_forward_hook(lambda *_: calls.append("after"))
    model.fc.register_forward_pre_hook(lambda *_: calls.append("before"))
    model(X).sum().backward()
    assert calls == ["before", "after"]
    assert type(model.fc) is nn.Linear
    assert repr(model) == repr(plain)
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model(X), plain(X))


def test_signatures_can_still_be_read():
    model, _ = gated()
    assert inspect.signature(model.forward) == inspect.signature(Model().forward)
    assert model.forward.__wrapped__.__code__ is Model.forward.__code__


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled, _saved])
def test_copies_and_pickles_are_plain(duplicate):
    model, gate = gated()
    other = duplicate(duplicate(model))
    stand_ins = [getattr(m.forward, "__self__", None) for m in other.modules()]
    assert not any(isinstance(s, GatedForward) and s.on for s in stand_ins)
    (other(X) * X.cos()).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in other.parameters())
    with torch.no_grad():
        other.fc.weight.zero_()
        other.scale.fill_(2.0)
    # The copy computes with its own parameters, and the original is still gated.
    assert torch.equal(other(X), 2 * other.norm(other.fc.bias.expand(3, 8)))
    model(X).sum().backward()
    assert not model.fc.weight.grad[2:4].any()
    assert model.scale.grad is None
    gate.remove()


def test_a_module_copied_alone_is_plain():
    model, _ = gated()
    alone = copy.deepcopy(model.norm)
    alone(X).sum().backward()
    assert alone.weight.grad is not None


@pytest.mark.parametrize("duplicate", [copy.deepcopy, None])
def test_a_forward_that_somebody_put_on_the_instance_stays(duplicate):
    model = Model()
    own = _Twice(model.norm)
    model.norm.forward = own
    units = [unit("norm", Slice("norm.weight")), unit("fc", Slice("fc.weight"))]
    gate = check(model, units, [False, True], lambda m: m(X))
    if duplicate is not None:
        assert isinstance(duplicate(model).norm.forward, _Twice)
    assert isinstance(_pickled(model).norm.forward, _Twice)
    gate.remove()
    assert model.norm.forward is own


def test_no_rule_is_put_in_place_of_a_forward_on_the_instance():
    model = Model()
    model.fc.forward = _Twice(model.fc)
    units = rows("fc.weight", even(8, 4))
    gate = check(model, units, [True, False, False, True], lambda m: m.fc(X))
    assert gate.in_full == ("fc.weight",)


class _Twice:
    """An instance-level forward, as libraries that move weights around install them."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        return 2 * type(self.module).forward(self.module, x)


def test_a_wrapper_around_a_gated_forward_keeps_working_after_removal():
    model, gate = gated()
    inner = model.fc.forward
    model.fc.forward = lambda x: 3 * inner(x)
    gate.remove()
    model.fc(X).sum().backward()
    assert bool(model.fc.weight.grad.any(dim=1).all())


def test_other_hooks_on_parameters_stay():
    model = Model()
    seen = []
    model.scale.register_hook(seen.append)
    model.fc.weight.register_hook(seen.append)
    part = Partition([*rows("fc.weight", even(8, 4)), unit("scale", Slice("scale"))], model)
    with Gate(model, part) as gate:
        gate.apply([True, True, False, True, False])
    model(X).sum().backward()
    assert len(seen) == 2
