"""Each unit is stepped as if its slabs were parameters of their own."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

from lightning_mat.optim import MATOptimizer, pieces
from lightning_mat.units.core import Partition
from lightning_mat.units.unit import Slice, Unit, matrix_shape
from tests.optim.cases import (
    HOW,
    OPTIMIZERS,
    OTHERS,
    SCALARS,
    UNITS,
    Make,
    Model,
    gradients,
    set_gradients,
    units_of,
)
from tests.reference.optim import SlabOracle

Decisions = list[tuple[list[bool], int, str | None]]


def assert_same_values(model: nn.Module, oracle: SlabOracle) -> None:
    for name, param in model.named_parameters():
        torch.testing.assert_close(
            param.detach(), oracle.params[name], rtol=1e-12, atol=1e-14, msg=name
        )


def steps_by_element(optimizer: MATOptimizer, model: nn.Module, name: str) -> Tensor:
    """Step count of every element of a parameter, from a checkpoint; NaN before the first."""
    saved = optimizer.state_dict()
    param = model.get_parameter(name)
    steps = torch.full(matrix_shape(param.shape), torch.nan)
    if name not in saved["mat"]:
        return steps.fill_(optimizer.inner.state.get(param, {}).get("step", torch.nan)).flatten()
    counts = saved["mat"][name]["history"].get("step")
    for index, r0, r1, c0, c1 in saved["mat"][name]["slabs"].tolist():
        steps[r0:r1, c0:c1] = torch.nan if counts is None else counts[index]
    return steps.flatten()


def assert_same_state(optimizer: MATOptimizer, model: nn.Module, oracle: SlabOracle) -> None:
    """Moments and step counts of every slab."""
    for name, param in model.named_parameters():
        steps = steps_by_element(optimizer, model, name)
        state = optimizer.inner.state.get(param, {})
        slabs = oracle.state(name)
        assert bool(state) == any(expected for _, expected in slabs), name
        for index, expected in slabs:
            for key in expected.keys() - SCALARS:
                torch.testing.assert_close(
                    state[key].flatten()[index], expected[key], rtol=1e-12, atol=1e-14
                )
            counted = torch.as_tensor(expected.get("step", torch.nan), dtype=steps.dtype)
            torch.testing.assert_close(steps[index], counted.expand(len(index)), equal_nan=True)


def run_against_oracle(make: Make, decisions: Decisions, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = Model()
    part = units_of(model)
    optimizer = MATOptimizer(make(model.parameters()), model, part)
    oracle = SlabOracle(model, part, lambda _, params: make(params))
    for active, steps, missing in decisions:
        optimizer.apply(torch.tensor(active))
        for _ in range(steps):
            grads = gradients(model, generator, missing)
            set_gradients(model, grads)
            optimizer.step()
            oracle.step(grads, active)
            assert_same_values(model, oracle)
    assert_same_state(optimizer, model, oracle)


decision = st.tuples(
    st.lists(st.booleans(), min_size=UNITS, max_size=UNITS),
    st.integers(1, 2),
    st.sampled_from([None, None, "rows", "columns", "whole"]),
)
random_decisions = given(
    decisions=st.lists(decision, min_size=2, max_size=5), seed=st.integers(0, 99)
)
quick = settings(
    max_examples=5,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.mark.parametrize("pack_below", [0, 16_384], ids=["views", "packed"])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", OPTIMIZERS)
@quick
@random_decisions
def test_each_slab_is_stepped_as_its_own_parameter(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    how: str,
    pack_below: int,
    decisions: Decisions,
    seed: int,
) -> None:
    monkeypatch.setattr(pieces, "PACK_BELOW", pack_below)
    run_against_oracle(partial(OPTIMIZERS[name], **HOW[how]), decisions, seed)


@pytest.mark.parametrize("name", OTHERS)
@quick
@random_decisions
def test_other_elementwise_optimizers_too(name: str, decisions: Decisions, seed: int) -> None:
    run_against_oracle(OTHERS[name], decisions, seed)


def test_groups_keep_their_own_options() -> None:
    model = Model()
    part = units_of(model)
    options = {
        "rows": {"lr": 0.3, "weight_decay": 0.0},
        "conv": {"lr": 0.1, "betas": (0.5, 0.5), "amsgrad": True},
        "columns": {"lr": 0.1, "fused": True},
    }
    groups = [{"params": [model.get_parameter(name)], **kept} for name, kept in options.items()]
    others = [p for name, p in model.named_parameters() if name not in options]
    optimizer = MATOptimizer(AdamW([*groups, {"params": others}], lr=0.2), model, part)
    oracle = SlabOracle(
        model, part, lambda name, params: AdamW(params, **options.get(name, {"lr": 0.2}))
    )
    generator = torch.Generator().manual_seed(0)
    for active in ([True, False] * 3, [False, True] * 3, [True] * 6):
        optimizer.apply(active[:UNITS])
        grads = gradients(model, generator)
        set_gradients(model, grads)
        optimizer.step()
        oracle.step(grads, active)
        assert_same_values(model, oracle)
    assert_same_state(optimizer, model, oracle)


def test_two_optimizers_share_a_model() -> None:
    model = Model()
    part = units_of(model)
    mine = [model.rows, model.conv]
    theirs = [p for p in model.parameters() if all(p is not q for q in mine)]
    both = [
        MATOptimizer(SGD(mine, lr=0.1, momentum=0.9), model, part),
        MATOptimizer(Adam(theirs, lr=0.1), model, part),
    ]
    oracle = SlabOracle(
        model,
        part,
        lambda name, p: SGD(p, lr=0.1, momentum=0.9) if name in ("rows", "conv") else Adam(p, 0.1),
    )
    generator = torch.Generator().manual_seed(0)
    for active in ([True, False, True, False, False], [False, True, True, True, True]):
        grads = gradients(model, generator)
        set_gradients(model, grads)
        for optimizer in both:
            optimizer.apply(active)
            optimizer.step()
        oracle.step(grads, active)
        assert_same_values(model, oracle)
    assert set(both[0].state_dict()["mat"]) == {"rows", "conv"}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_all_units_active_is_the_plain_optimizer_bit_for_bit(name: str, how: str) -> None:
    model, plain_model = Model(), Model()
    plain_model.load_state_dict(model.state_dict())
    make = partial(OPTIMIZERS[name], **HOW[how])
    optimizer = MATOptimizer(make(model.parameters()), model, units_of(model))
    plain = make(plain_model.parameters())
    optimizer.apply([True] * UNITS)
    for seed in range(3):
        for each in (model, plain_model):
            set_gradients(each, gradients(each, torch.Generator().manual_seed(seed)))
        optimizer.step()
        plain.step()
    for ours, theirs in zip(model.parameters(), plain_model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert optimizer.state_dict()["mat"] == {}


class CountingAdam(Adam):
    """Counts the tensors and the elements that it is given."""

    def _init_group(self, group, params, grads, *rest):
        found = super()._init_group(group, params, grads, *rest)
        self.tensors = len(params)
        self.elements = sum(p.numel() for p in params)
        return found


def test_resting_slabs_never_reach_the_optimizer() -> None:
    model = Model()
    part = units_of(model)
    inner = CountingAdam(model.parameters())
    optimizer = MATOptimizer(inner, model, part)
    set_gradients(model, gradients(model, torch.Generator()))
    active = torch.tensor([True, False, False, True, False])
    optimizer.apply(active)
    optimizer.step()
    everything = sum(p.numel() for p in model.parameters())
    assert inner.elements == everything - int(part.numel[~active].sum())
    assert model.whole not in inner.state
    optimizer.apply([True] * UNITS)
    optimizer.step()
    assert inner.elements == everything


def test_neighbouring_slabs_are_one_tensor_and_all_awake_is_the_parameter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pieces, "PACK_BELOW", 0)
    model = nn.Linear(2, 8, bias=False)
    part = Partition(
        [Unit(f"{i}", "ffn", "fc", (Slice("weight", 0, i, i + 1),)) for i in range(8)], model
    )
    inner = CountingAdam(model.parameters())
    optimizer = MATOptimizer(inner, model, part)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.apply([True] * 3 + [False] * 2 + [True] * 3)
    optimizer.step()
    assert (inner.tensors, inner.elements) == (2, 12)
    optimizer.apply([False] * 3 + [True] * 2 + [False] * 3)
    optimizer.step()
    assert (inner.tensors, inner.elements) == (1, 4)
    optimizer.apply([True] * 8)  # all have one step: one history
    optimizer.step()
    assert (inner.tensors, inner.elements) == (1, 16)
    assert optimizer.state_dict()["mat"] == {}


def test_a_resting_unit_is_bit_equal_after_any_number_of_steps() -> None:
    model = Model()
    optimizer = MATOptimizer(AdamW(model.parameters(), weight_decay=0.5), model, units_of(model))
    generator = torch.Generator().manual_seed(0)
    set_gradients(model, gradients(model, generator))
    optimizer.step()
    moments = optimizer.state[model.rows]["exp_avg"][:2].clone()
    values = model.rows[:2].detach().clone()
    optimizer.apply([False, True, True, True, True])
    for _ in range(5):
        set_gradients(model, gradients(model, generator))
        optimizer.step()
    assert torch.equal(model.rows[:2], values)
    assert torch.equal(optimizer.state[model.rows]["exp_avg"][:2], moments)


def test_nothing_trains_is_a_step_that_changes_nothing() -> None:
    model = nn.Linear(3, 2)
    part = Partition([Unit("all", "layer", "fc", (Slice("weight"), Slice("bias")))], model)
    for make in OPTIMIZERS.values():
        optimizer = MATOptimizer(make(model.parameters()), model, part)
        model(torch.ones(3)).sum().backward()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.apply([False])
        optimizer.step()
        assert all(map(torch.equal, before, model.parameters()))
        assert not optimizer.state


def test_fused_sgd_wakes_a_parameter_that_has_no_momentum_yet() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    units = [
        Unit(str(i), "layer", str(i), (Slice(f"{i}.weight"), Slice(f"{i}.bias"))) for i in (0, 1)
    ]
    part = Partition(units, model)
    make = partial(SGD, lr=0.1, momentum=0.9, fused=True)
    optimizer = MATOptimizer(make(model.parameters()), model, part)
    oracle = SlabOracle(model, part, lambda _, params: make(params))
    for active in ([True, False], [True, True], [True, True]):
        optimizer.apply(active)
        grads = gradients(model, torch.Generator().manual_seed(0))
        set_gradients(model, grads)
        optimizer.step()
        oracle.step(grads, active)
        assert_same_values(model, oracle)


@pytest.mark.parametrize("pack_below", [0, 16_384], ids=["views", "packed"])
@pytest.mark.parametrize("how", HOW)
def test_gradients_may_be_laid_out_in_another_way_than_the_parameter(
    how: str, pack_below: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PACK_BELOW", pack_below)
    model = nn.Conv2d(4, 6, 3, bias=False).to(memory_format=torch.channels_last)
    units = [Unit(str(i), "filter", "", (Slice("weight", 0, i, i + 1),)) for i in range(6)]
    part = Partition(units, model)
    make = partial(AdamW, **HOW[how])
    optimizer = MATOptimizer(make(model.parameters()), model, part)
    oracle = SlabOracle(model, part, lambda _, params: make(params))
    active = [True, True, False, False, True, False]
    optimizer.apply(active)
    grad = torch.randn(6, 4, 3, 3)
    assert grad.stride() != model.weight.stride()
    for _ in range(3):
        model.weight.grad = grad.clone()
        optimizer.step()
        oracle.step({"weight": grad}, active)
        assert_same_values(model, oracle)


def test_the_parameter_may_get_new_memory_in_the_middle_of_an_episode() -> None:
    for pack_below in (0, 16_384):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pieces, "PACK_BELOW", pack_below)
            model = Model()
            part = units_of(model)
            optimizer = MATOptimizer(Adam(model.parameters()), model, part)
            oracle = SlabOracle(model, part, lambda _, params: Adam(params))
            optimizer.apply([True, False] * 2 + [True])
            for seed in range(3):
                for param in model.parameters():
                    param.data = param.data.clone(memory_format=torch.preserve_format)
                grads = gradients(model, torch.Generator().manual_seed(seed))
                set_gradients(model, grads)
                optimizer.step()
                oracle.step(grads, [True, False] * 2 + [True])
                assert_same_values(model, oracle)


@pytest.mark.parametrize("pack_below", [0, 16_384], ids=["views", "packed"])
def test_autograd_sees_that_the_parameter_changed(
    pack_below: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PACK_BELOW", pack_below)
    model = Model()
    optimizer = MATOptimizer(SGD(model.parameters(), lr=0.1), model, units_of(model))
    optimizer.apply([True, False] * 2 + [True])
    loss = (model.rows**2).sum()
    set_gradients(model, gradients(model, torch.Generator()))
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("pack_below", [0, 16_384], ids=["views", "packed"])
@pytest.mark.parametrize("how", ["loop", "foreach"])
@pytest.mark.parametrize("name", ["momentum", "amsgrad"])
def test_chunks_are_stepped_like_the_whole(
    name: str, how: str, pack_below: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PACK_BELOW", pack_below)
    monkeypatch.setattr(pieces, "chunk_of", lambda _: 5)
    make = partial(OPTIMIZERS[name], **HOW[how])
    some, others = [True, False] * 2 + [True], [False, True] * 2 + [False]
    run_against_oracle(
        make, [([True] * 5, 2, None), (some, 2, None), (others, 2, "whole"), ([True] * 5, 1, None)]
    )
    run_against_oracle(make, [(some, 2, "columns"), (others, 1, None), (some, 2, None)])


def test_a_large_parameter_is_handed_over_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "chunk_of", lambda _: 8)
    model = Model()
    inner = CountingAdam(model.parameters())
    optimizer = MATOptimizer(inner, model, units_of(model))
    set_gradients(model, gradients(model, torch.Generator()))
    optimizer.step()
    assert inner.tensors == len(list(model.parameters()))  # everything trains: torch's own step
    optimizer.apply([True, True, True, True, False])
    optimizer.step()
    assert inner.elements == sum(p.numel() for p in model.parameters()) - 5
    assert inner.tensors == 3 + 1 + 3 + 5 + 6 + 4 + 1
