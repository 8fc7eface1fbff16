"""Units with rates are stepped as if their slabs were in groups of scaled learning rates."""

from __future__ import annotations

import copy
import gc
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ExponentialLR

from lightning_mat.optim import MATOptimizer, pieces
from tests.optim.cases import (
    HOW,
    OPTIMIZERS,
    UNITS,
    Make,
    Model,
    gradients,
    set_gradients,
    units_of,
)
from tests.optim.test_oracle import assert_same_state, assert_same_values, quick
from tests.reference.optim import SlabOracle

Decisions = list[tuple[list[bool], list[float] | None, int, str | None]]
ALL = [True] * UNITS
FAST, SLOW = [True, True, False, False, False], [False, False, True, True, True]


def scale(oracle: SlabOracle, rates: list[float] | None) -> None:
    """Give the optimizer of every slab the learning rate of its unit."""
    for _, unit, _, _, optimizer in oracle.slabs:
        rate = 1.0 if rates is None or unit is None else rates[unit]
        for group in optimizer.param_groups:
            group["lr"] = optimizer.defaults["lr"] * rate


def run_against_oracle(make: Make, decisions: Decisions, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = Model()
    part = units_of(model)
    optimizer = MATOptimizer(make(model.parameters()), model, part)
    oracle = SlabOracle(model, part, lambda _, params: make(params))
    for active, rates, steps, missing in decisions:
        optimizer.apply(active, rates)
        scale(oracle, rates)
        for _ in range(steps):
            grads = gradients(model, generator, missing)
            set_gradients(model, grads)
            optimizer.step()
            oracle.step(grads, active)
            assert_same_values(model, oracle)
    assert_same_state(optimizer, model, oracle)


decision = st.tuples(
    st.lists(st.booleans(), min_size=UNITS, max_size=UNITS),
    st.none() | st.lists(st.sampled_from([1.0, 0.5, 2.0]), min_size=UNITS, max_size=UNITS),
    st.integers(1, 2),
    st.sampled_from([None, None, "rows", "whole"]),
)


@pytest.mark.parametrize("pack_below", [0, 16_384], ids=["views", "packed"])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", OPTIMIZERS)
@quick
@given(decisions=st.lists(decision, min_size=2, max_size=4), seed=st.integers(0, 99))
def test_a_rate_is_a_factor_of_the_learning_rate(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    how: str,
    pack_below: int,
    decisions: Decisions,
    seed: int,
) -> None:
    monkeypatch.setattr(pieces, "PACK_BELOW", pack_below)
    run_against_oracle(partial(OPTIMIZERS[name], **HOW[how]), decisions, seed)


@pytest.mark.parametrize("how", ["loop", "fused"])
def test_a_learning_rate_may_be_a_tensor(how: str) -> None:
    make = partial(Adam, lr=torch.tensor(0.1), **HOW[how])
    run_against_oracle(make, [(ALL, [1.0, 2.0, 0.5, 2.0, 0.25], 2, None), (FAST, None, 2, None)])


def test_large_parameters_in_chunks_have_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "chunk_of", lambda _: 2)
    monkeypatch.setattr(pieces, "FUSED_CHUNK", 2)
    rates = [1.0, 2.0, 0.5, 2.0, 0.25]
    for how in HOW.values():
        run_against_oracle(partial(AdamW, lr=0.1, **how), [(ALL, rates, 3, None)])


class CountingSGD(SGD):
    """Counts the elements that it is given at each learning rate."""

    def _init_group(self, group: dict[str, Any], *rest: Any) -> Any:
        numel = sum(p.numel() for p in group["params"])
        self.shown[group["lr"]] = self.shown.get(group["lr"], 0) + numel
        return super()._init_group(group, *rest)

    def counted(self, optimizer: MATOptimizer) -> dict[float, int]:
        """Step."""
        self.shown: dict[float, int] = {}
        optimizer.step()
        return self.shown


def test_rates_of_one_are_no_rates() -> None:
    model = Model()
    inner = CountingSGD(model.parameters(), lr=0.5)
    optimizer = MATOptimizer(inner, model, units_of(model))
    set_gradients(model, gradients(model, torch.Generator()))
    optimizer.apply(ALL, torch.ones(UNITS))
    assert inner.counted(optimizer) == {0.5: sum(p.numel() for p in model.parameters())}
    # Of those that rest nothing is read.
    optimizer.apply(FAST, [1.0, 1.0, torch.nan, 0.0, -1.0])
    assert set(inner.counted(optimizer)) == {0.5}


def test_slabs_of_different_rates_are_shown_apart_and_join_again() -> None:
    model = Model()
    inner = CountingSGD(model.parameters(), lr=0.5)
    optimizer = MATOptimizer(inner, model, units_of(model))
    set_gradients(model, gradients(model, torch.Generator()))
    optimizer.apply(ALL, [1.0, 2.0, 2.0, 1.0, 1.0])
    doubled = int(optimizer.part.numel[1] + optimizer.part.numel[2])
    total = sum(p.numel() for p in model.parameters())
    assert inner.counted(optimizer) == {0.5: total - doubled, 1.0: doubled}
    # Their history is one: without rates they are whole parameters.
    optimizer.apply(ALL)
    assert inner.counted(optimizer) == {0.5: total}
    assert optimizer.state_dict()["mat"] == {}


def test_schedulers_see_the_groups_themselves() -> None:
    model = Model()
    optimizer = MATOptimizer(SGD(model.parameters(), lr=0.5), model, units_of(model))
    scheduler = ExponentialLR(optimizer, 0.5)
    optimizer.apply(ALL, [4.0] * UNITS)
    before = model.whole.detach().clone()
    for _ in range(2):
        set_gradients(model, {n: torch.ones_like(p) for n, p in model.named_parameters()})
        optimizer.step()
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.125]
    torch.testing.assert_close(before - model.whole, torch.full((2, 2), 4 * (0.5 + 0.25)))


def test_a_resumed_run_goes_on_with_its_rates() -> None:
    def run(resume: bool) -> Model:
        torch.manual_seed(1)
        model = Model()
        optimizer = MATOptimizer(Adam(model.parameters(), lr=0.1), model, units_of(model))
        for step in range(6):
            if resume and step == 3:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = MATOptimizer(Adam(model.parameters()), model, units_of(model))
                optimizer.load_state_dict(saved)
            optimizer.apply(FAST if step < 2 else ALL, [1.0, 2.0, 0.5, 2.0, 3.0])
            set_gradients(model, gradients(model, torch.Generator().manual_seed(step)))
            optimizer.step()
        return model

    for ours, theirs in zip(run(True).parameters(), run(False).parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_copies_keep_rates() -> None:
    model = Model()
    optimizer = MATOptimizer(SGD(model.parameters(), lr=0.5), model, units_of(model))
    optimizer.apply(ALL, [2.0] * UNITS)
    twin = copy.deepcopy((model, optimizer))
    for each, stepped in ((model, optimizer), twin):
        set_gradients(each, gradients(each, torch.Generator().manual_seed(0)))
        stepped.step()
    for ours, theirs in zip(model.parameters(), twin[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("how", HOW)
def test_decisions_that_alternate_leave_nothing_behind(how: str) -> None:
    model = Model()
    inner: Optimizer = Adam(model.parameters(), **HOW[how])
    optimizer = MATOptimizer(inner, model, units_of(model))

    def alternate(rounds: int) -> tuple[int, int]:
        for _ in range(rounds):
            for active, rates in ((FAST, [1.0] * 5), (FAST, None), (SLOW, [2.0] * 5)):
                optimizer.apply(active, rates)
                for _ in range(2):
                    set_gradients(model, gradients(model, torch.Generator().manual_seed(0)))
                    optimizer.step()
        gc.collect()
        alive = [found for found in gc.get_objects() if issubclass(type(found), Tensor)]
        return len(alive), len(inner.state)

    alternate(3)
    (few, states), (many, states_later) = alternate(1), alternate(6)
    assert many <= few  # what else was alive may have gone
    assert states == states_later
    assert len(inner.param_groups) == 1


WRONG: dict[str, Any] = {
    r"for each of the 5 units, got shape \(4,\)": [1.0] * 4,
    r"got shape \(5, 1\)": torch.ones(5, 1),
    "above 0 for units that train, got 0.0 for 'unit.1'": [1.0, 0.0, 1.0, 1.0, 1.0],
    "above 0 for units that train, got -2.0 for 'crossed'": [1.0, 1.0, 1.0, -2.0, 1.0],
    "finite and above 0 for units that train, got inf": [torch.inf] * 5,
    "finite and above 0 for units that train, got nan": [torch.nan] * 5,
}


@pytest.mark.parametrize("message", WRONG)
def test_rates_that_are_none_are_refused(message: str) -> None:
    model = Model()
    optimizer = MATOptimizer(SGD(model.parameters(), lr=0.5), model, units_of(model))
    optimizer.apply(FAST)
    with pytest.raises(ValueError, match=message):
        optimizer.apply(ALL, WRONG[message])
    assert "2 of 5 units" in repr(optimizer)


def test_a_group_without_a_learning_rate_has_no_rates() -> None:
    model = Model()
    inner = SGD(model.parameters(), lr=0.5)
    optimizer = MATOptimizer(inner, model, units_of(model))
    del inner.param_groups[0]["lr"]
    with pytest.raises(ValueError, match="SGD has a parameter group without one"):
        optimizer.apply(ALL, [1.0] * UNITS)
