"""Gate: decisions come and go, and the rest of PyTorch goes on working around it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_mat.gate import Gate
from lightning_mat.units.core import Partition
from lightning_mat.units.unit import Slice, Unit
from tests.gate.cases import SavedBytes, assert_close, check, even, rows, some, unit
from tests.reference.gate import expected_gradients

X = torch.linspace(-1, 1, 6 * 8, dtype=torch.float64).sin().view(2, 3, 8)


def ffn(width: int = 12, parts: int = 4) -> tuple[nn.Sequential, list[Unit]]:
    """Two linear layers; a unit owns hidden features: rows of the first, columns of the second."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, 8))
    units = [
        unit(
            f"ffn.{i}",
            Slice("0.weight", 0, a, b),
            Slice("0.bias", 0, a, b),
            Slice("3.weight", 1, a, b),
        )
        for i, (a, b) in enumerate(even(width, parts))
    ]
    return model.double(), [*units, unit("norm", Slice("2.weight"), Slice("2.bias"))]


def gated(active: list[bool]) -> tuple[nn.Sequential, Gate]:
    model, units = ffn()
    gate = Gate(model, Partition(units, model))
    gate.apply(active)
    return model, gate


RESTS = [True, False, True, False, False]


def resting_rows(model: nn.Sequential) -> Tensor:
    return torch.cat([model[0].weight.grad[3:6], model[0].weight.grad[9:]])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=6))
def test_any_sequence_of_decisions_equals_plain_steps_with_the_same_decisions(decisions):
    model, units = ffn()
    part = Partition(units, model)
    twin, _ = ffn()
    gate = Gate(model, part)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3) for m in (model, twin)]
    for step, active in enumerate(decisions):
        gate.apply(torch.tensor(active))
        x = (X + step).sin()
        optimizers[0].zero_grad()
        model(x).square().sum().backward()
        expected = expected_gradients(twin, part, active, lambda x=x: twin(x).square().sum())
        for (name, param), other in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert_close(param.grad, expected[name], 1e-10)
            other.grad = expected[name]
        for optimizer in optimizers:
            optimizer.step()
        for other in twin.parameters():
            other.grad = None
    for param, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(param.detach(), other.detach(), 1e-10)


def test_all_active_is_the_plain_model():
    model, units = ffn()
    check(model, units, [True] * 5, lambda m: m(X))
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_clipping_by_norm_sees_what_trains_only():
    model, _ = gated(RESTS)
    model(X).square().sum().backward()
    parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    trained = torch.cat([part[part != 0] for part in parts])
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert float(norm) == pytest.approx(float(trained.norm()), rel=1e-12)


@pytest.mark.parametrize("active", [RESTS, [False] * 5])
def test_gradients_of_micro_batches_add_up(active):
    model, units = ffn()
    part = Partition(units, model)
    expected = expected_gradients(
        model, part, active, lambda: model(X).sum() + model(2 * X).square().sum()
    )
    gate = Gate(model, part)
    gate.apply(active)
    model(X).sum().backward()
    model(2 * X).square().sum().backward()
    for name, param in model.named_parameters():
        assert_close(param.grad, expected[name], 1e-10)


def test_a_gradient_left_from_before_is_dropped_where_a_parameter_rests_whole():
    model, gate = gated([True] * 5)
    model(X).sum().backward()
    gate.apply([False] * 5)
    assert [p.grad is None for p in model.parameters()] == [True, True, True, True, True, False]


def test_a_graph_may_be_used_twice():
    model, _ = gated(RESTS)
    loss = model(X).square().sum()
    loss.backward(retain_graph=True)
    once = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    loss.backward()
    for param, grad in zip(model.parameters(), once, strict=True):
        assert_close(param.grad, None if grad is None else 2 * grad, 1e-12)
    assert not resting_rows(model).any()


def test_the_decision_at_the_forward_pass_counts():
    model, gate = gated(RESTS)
    loss = model(X).square().sum()
    gate.remove()
    loss.backward()
    assert not resting_rows(model).any()
    assert model[2].weight.grad is None


def test_autograd_grad_gives_the_same_as_backward():
    model, _ = gated(RESTS)
    found = torch.autograd.grad(model(X).sum(), [model[0].weight, model[3].weight])
    model(X).sum().backward()
    assert torch.equal(found[0], model[0].weight.grad)
    assert torch.equal(found[1], model[3].weight.grad)


def test_non_reentrant_checkpointing_gives_the_same_gradients():
    model, units = ffn()
    leaf = X.clone().requires_grad_()
    for active in (RESTS, [False] * 5):
        gate = check(
            model, units, active, lambda m: checkpoint(m, leaf, use_reentrant=False), [leaf]
        )
        gate.remove()


def test_without_gradients_the_plain_forward_runs():
    model, gate = gated(RESTS)
    seen = []
    model[0].forward.__self__.run = lambda x: seen.append(x)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            out = model(X)
            assert not out.requires_grad
    assert seen == []
    gate.remove()
    assert torch.equal(out, model(X))


def test_transforms_see_the_plain_model():
    model, gate = gated(RESTS)
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, params, (x,)).square().sum()

    for transform in (
        torch.func.grad(loss),
        torch.func.vmap(torch.func.grad(loss), (None, 0)),
        torch.func.jacfwd(loss),
    ):
        found = transform(params, X)
        gate.remove()
        expected = transform(params, X)
        gate.apply(RESTS)
        for name in params:
            assert torch.equal(found[name], expected[name])


def test_transforms_over_inputs_see_the_plain_model():
    model, gate = gated(RESTS)

    def found() -> list[Tensor]:
        return [
            torch.func.vmap(model)(X),
            torch.func.grad(lambda x: model(x).square().sum())(X),
            torch.func.jvp(model, (X,), (X.cos(),))[1],
        ]

    inside = found()
    gate.remove()
    assert all(torch.equal(a, b) for a, b in zip(inside, found(), strict=True))


def test_exchanged_parameters_are_not_gated():
    model, _ = gated(RESTS)
    params = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    torch.func.functional_call(model, params, (X,)).square().sum().backward()
    assert all(p.grad.any(dim=-1).all() for p in params.values())


def test_a_moved_model_keeps_its_gate():
    model, _ = gated(RESTS)
    model.float()
    model(X.float()).square().sum().backward()
    assert model[0].weight.grad.dtype == torch.float32
    assert not resting_rows(model).any()


def test_saved_bytes_shrink_with_what_rests():
    model, units = ffn(width=64, parts=8)
    part = Partition(units, model)
    totals = []
    for trained in (9, 8, 4, 2, 0):
        with Gate(model, part) as gate:
            gate.apply([i < trained for i in range(9)])
            with SavedBytes(model) as saved:
                model(X)
            totals.append(saved.total)
    assert totals == sorted(totals, reverse=True)
    # The second layer's input: tokens × 64 features × 8 bytes, of which a quarter is needed.
    assert totals[1] - totals[3] == 6 * 48 * 8
    assert totals[0] > totals[-1]


@pytest.mark.parametrize("compiled_first", [True, False])
def test_a_compiled_model_follows_the_decisions(compiled_first):
    torch._dynamo.reset()
    model, units = ffn()
    part = Partition(units, model)
    compiled = torch.compile(model, backend="aot_eager", dynamic=False)
    if compiled_first:
        compiled(X).sum().backward()
        model.zero_grad()
    decisions = [RESTS, [False] * 5, [True] * 5, RESTS]
    expected = [
        expected_gradients(model, part, active, lambda: model(X).square().sum())
        for active in decisions
    ]
    gate = Gate(model, part)
    for active, wanted in zip(decisions, expected, strict=True):
        gate.apply(active)
        compiled(X).square().sum().backward()
        for name, param in model.named_parameters():
            assert_close(param.grad, wanted[name], 1e-10)
        model.zero_grad()
    torch._dynamo.reset()


def test_an_unknown_skip_names_the_choices():
    model, units = ffn()
    with pytest.raises(ValueError, match=r"skip must be one of .*'units', got 'all'"):
        Gate(model, Partition(units, model), skip="all")


@pytest.mark.parametrize("other", [nn.Linear(8, 12), nn.Sequential(nn.Linear(9, 12))])
def test_a_partition_of_another_model_is_refused(other):
    model, units = ffn()
    with pytest.raises(ValueError, match=r"'0\.weight'.*which this model has not"):
        Gate(other, Partition(units, model))


def test_a_decision_of_another_length_or_type_is_refused():
    model, gate = gated(RESTS)
    for wrong in (torch.ones(4, dtype=torch.bool), torch.ones(5)):
        with pytest.raises(ValueError, match="bool tensor of shape"):
            gate.apply(wrong)
    model(X).sum().backward()
    assert not resting_rows(model).any()


def test_two_gates_on_one_module_are_refused_and_the_first_goes_on():
    model, gate = gated(RESTS)
    second = Gate(model, gate.part)
    with pytest.raises(RuntimeError, match="module '0': a gate is on it already"):
        second.apply(some(5))
    model(X).sum().backward()
    assert not resting_rows(model).any()
    gate.remove()
    second.apply(some(5))
    assert "forward" in model[0].__dict__


def test_units_of_nothing_but_rows_of_biases():
    model = nn.Linear(8, 6).double()
    check(model, rows("bias", even(6, 3)), some(3), lambda m: m(X))
