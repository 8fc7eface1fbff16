"""policies.MAT(budget=...): within the share, nothing that fits left out."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mat import policies
from lightning_mat.policies.budget import within_budget
from lightning_mat.policies.protect import strongest


@pytest.fixture
def costly(make):
    """Return four units of two layers that cost 40 of the 100 FLOPs of a full step."""
    return make.table(4, layers=("a", "a", "b", "b"), cost=(10, 10, 10, 10), full_cost=100)


def test_the_units_with_the_most_eigenvalue_per_flop_train(make):
    # Per FLOP: 2, 4, 3, 2.5. Without units 60, so 75 leaves 15: units 1 and 2, and unit 3 (20)
    # and unit 0 (10) no longer fit into the 5 that remain.
    table = make.table(4, cost=(10, 5, 5, 20), full_cost=100)
    decision = policies.MAT(budget=0.75, protect=False).decide(
        make.history([[20, 20, 15, 50]]), table, 0
    )
    assert decision.reasons == ("over budget", "budget", "budget", "over budget")
    assert table.cost_share(decision.active) == pytest.approx(0.7)
    assert decision.thresholds == {}


def test_protected_units_come_first(make, costly):
    decision = policies.MAT(budget=0.8).decide(make.history([[9, 8, 1, 2]]), costly, 0)
    assert decision.reasons == ("protected", "over budget", "over budget", "protected")
    bare = policies.MAT(budget=0.8, protect=False).decide(make.history([[9, 8, 1, 2]]), costly, 0)
    assert bare.active.tolist() == [True, True, False, False]


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_the_budget_is_kept_and_no_resting_unit_would_still_fit(make, data):
    count = data.draw(st.integers(1, 10))
    cost = data.draw(st.lists(st.floats(0, 1e9), min_size=count, max_size=count))
    value = data.draw(st.lists(st.floats(0, 1e16), min_size=count, max_size=count))
    layers = data.draw(st.lists(st.sampled_from("abc"), min_size=count, max_size=count))
    budget = data.draw(st.floats(0.01, 1))
    full = sum(cost) * data.draw(st.floats(1, 4)) + 1.0
    table = make.table(count, layers=layers, cost=cost, full_cost=full)
    lambda_max = torch.tensor(value, dtype=torch.float64)
    first = strongest(lambda_max, table)
    active = within_budget(lambda_max, table, budget, first)
    assert active[first].all()
    share, slack = table.cost_share(active), 1e-9
    if table.cost_share(first) > budget + slack:
        assert torch.equal(active, first)
        return
    assert share <= budget + slack
    for i in range(count):
        if not active[i]:
            assert share + cost[i] / full > budget - slack


@pytest.mark.parametrize("count", range(2, 14))
@pytest.mark.parametrize("cost", [0.1, 0.3, 0.7])
def test_a_budget_of_one_trains_every_unit_however_costs_round(make, count, cost):
    table = make.table(count, cost=[cost] * count, full_cost=sum([cost] * count) + 0.7)
    history = make.history([[1.0] * count])
    assert policies.MAT(budget=1.0, protect=False).decide(history, table, 0).active.all()


def test_units_that_cost_nothing_always_train(make):
    table = make.table(3, cost=(0, 0, 50), full_cost=100)
    active = (
        policies.MAT(budget=0.6, protect=False).decide(make.history([[0, 1, 99]]), table, 0).active
    )
    assert active.tolist() == [True, True, False]


def decide(policy, history, table):
    """Return the decision and the texts of its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decision = policy.decide(history, table, len(history) - 1)
    assert all(w.filename == __file__ for w in caught)
    return decision, [str(w.message) for w in caught]


def test_a_budget_below_the_protected_minimum_trains_that_and_names_both_shares(make, costly):
    policy, rows = policies.MAT(budget=0.5), [[9, 8, 1, 2], [9, 8, 1, 2]]
    decision, texts = decide(policy, make.history(rows[:1]), costly)
    assert decision.active.tolist() == [True, False, False, True]
    (text,) = texts
    assert "costs 80.0% of a full step, more than the budget of 50.0%" in text
    assert decide(policy, make.history(rows), costly) == (decision, [])


def test_without_protection_a_budget_below_the_minimum_rests_every_unit(make, costly):
    decision, (text,) = decide(
        policies.MAT(budget=0.5, protect=False), make.history([[9, 8, 1, 2]]), costly
    )
    assert not decision.active.any()
    assert "trains no unit costs 60.0%" in text


def test_thresholds_and_the_temporal_policy_are_not_used(make, costly):
    history = make.history([[9, 8, 1, 2], [8, 7, 1, 2], [8, 7, 1, 2]])
    decision, texts = decide(policies.MAT(0.99, 1e3, permanent=True, budget=1.0), history, costly)
    assert decision.active.all()
    assert texts == []


def test_an_unknown_cost_of_a_full_step_is_an_error(make):
    with pytest.raises(ValueError, match=r"budget=0\.5 needs the cost of a full training step"):
        policies.MAT(budget=0.5).decide(make.history([[1, 2]]), make.table(2), 0)
    with pytest.raises(ValueError, match="cost of a full step is unknown"):
        make.table(2).cost_share(torch.tensor([True, True]))


def test_units_that_cost_more_than_the_step_are_an_error(make):
    table = make.table(2, cost=(60, 60), full_cost=100)
    with pytest.raises(ValueError, match="units cost 120 and a full step 100 FLOPs per sample"):
        policies.MAT(budget=0.5).decide(make.history([[1, 2]]), table, 0)
