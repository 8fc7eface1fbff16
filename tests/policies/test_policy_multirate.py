"""policies.Multirate: who steps when, and how far."""

from __future__ import annotations

import pickle
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mat import policies
from lightning_mat.policies import Decision, History


@given(
    count=st.integers(1, 9),
    k=st.integers(1, 6),
    fast=st.floats(0, 1),
    seed=st.integers(0, 99),
    protect=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_every_unit_moves_as_far_in_k_steps_whichever_group_it_is_in(
    make, count, k, fast, seed, protect
):
    table = make.table(
        3 * count, kinds=["head"] * (2 * count) + ["ffn"] * count, layers=["a", "b", "b"] * count
    )
    policy = policies.Multirate(k, fast, seed, protect)
    decisions = [policy.decide(History(), table, episode) for episode in range(3 * k)]
    distance = sum(d.active * d.rates for d in decisions)
    assert distance.tolist() == [3 * k] * len(table)
    steps = sum(d.active.int() for d in decisions)
    for members in table.by_layer_and_kind().values():
        exact = round(fast * len(members))
        quick = max(exact, 1) if protect else exact
        expected = [3 * k] * quick + [3] * (len(members) - quick)
        assert sorted(steps[members].tolist(), reverse=True) == expected
    assert all(d.active.all() for d in decisions[::k])


def test_the_groups_are_drawn_once_by_the_seed(make):
    table = make.table(16)
    random.seed(0)
    state = random.getstate()
    groups = {
        tuple(policies.Multirate(seed=seed).decide(History(), table, episode).active.tolist())
        for seed in range(4)
        for episode in (1, 2, 8)
    }
    assert random.getstate() == state
    assert len(groups) == 4
    policy = policies.Multirate(3, 0.25, 7)
    again = pickle.loads(pickle.dumps(policy))
    assert again.decide(make.history([[1.0] * 16]), table, 4) == policy.decide(History(), table, 4)


def test_this_split_never_changes(make):
    # Written down so that a run of the baseline can be repeated with a later version.
    active = policies.Multirate().decide(History(), make.table(8), 1).active
    assert active.nonzero().flatten().tolist() == [1, 4, 5, 7]


def test_multirate_needs_no_probe_and_brings_its_calendar(make):
    policy = policies.Multirate()
    assert isinstance(policy, policies.Policy)
    assert not policy.needs_spectra
    assert policy.every_n_steps == 1
    first, second = (policy.decide(History(), make.table(4), e) for e in (0, 1))
    assert first.summary() == "head: 4 of 4 train (2 fast, 2 slow), at up to 5 × the learning rate"
    assert second.summary() == "head: 2 of 4 train (2 fast, 2 between slow steps)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be a whole number ≥ 1, got 0"),
        ({"k": 2.5}, "k must be a whole number ≥ 1, got 2.5"),
        ({"fast": 1.5}, r"fast must be in \[0, 1\], got 1.5"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        policies.Multirate(**options)


@pytest.fixture
def decision():
    """Return a decision without rates."""
    return Decision(torch.tensor([True, False]), ("fast", "slow"), {}, ("head",) * 2)


def with_rates(decision, *rates):
    """Return the decision with rates."""
    return Decision(
        decision.active, decision.reasons, {}, decision.kinds, rates=torch.tensor(rates)
    )


def test_rates_are_part_of_a_decision(decision):
    fast, other = with_rates(decision, 1, 5), with_rates(decision, 1, 4)
    assert fast.rates.dtype == torch.float64
    assert len({decision, fast, other}) == 3
    assert Decision.from_state_dict(fast.state_dict()) == fast
    assert pickle.loads(pickle.dumps(fast)) == fast
    assert fast.trains_like(with_rates(decision, 1, 5))
    assert not fast.trains_like(other)
    assert not fast.trains_like(decision)
    earlier = {k: v for k, v in decision.state_dict().items() if k not in ("rates", "measure")}
    assert Decision.from_state_dict(earlier) == decision


def test_units_that_train_alike_may_do_so_for_other_reasons(decision):
    other = Decision(decision.active, ("protected", "slow"), {}, decision.kinds)
    assert other != decision
    assert other.trains_like(decision)


@pytest.mark.parametrize("rates", [(1.0,), (1.0, 0.0), (1.0, float("nan")), (-1.0, 1.0)])
def test_rates_that_are_none_are_refused(decision, rates):
    with pytest.raises(ValueError, match="rates must hold a positive, finite factor"):
        with_rates(decision, *rates)
