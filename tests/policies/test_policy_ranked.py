"""policies.Top and policies.Bottom: shares, ranks, protection."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mat import policies
from lightning_mat.policies import History

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@st.composite
def runs(draw):
    """Draw (values [P][L], kinds, layers)."""
    count = draw(st.integers(1, 12))
    probes = draw(st.integers(1, 4))
    value = st.one_of(st.integers(0, 5), st.integers(0, 2**30)).map(float)
    rows = draw(
        st.lists(st.lists(value, min_size=count, max_size=count), min_size=probes, max_size=probes)
    )
    some = [st.lists(st.sampled_from(c), min_size=count, max_size=count) for c in ("hf", "abc")]
    return rows, draw(some[0]), draw(some[1])


@pytest.mark.parametrize("policy", [policies.Top, policies.Bottom])
@given(run=runs(), fraction=st.floats(0, 1))
@settings(max_examples=80, deadline=None)
def test_without_protection_nobody_that_rests_ranks_before_one_that_trains(
    make, policy, run, fraction
):
    rows, kinds, layers = run
    history, table = make.history(rows), make.table(len(kinds), kinds, layers)
    decision = policy(fraction, protect=False).decide(history, table, 0)
    sign = 1 if policy is policies.Top else -1
    for members in table.by_kind().values():
        assert int(decision.active[members].sum()) == round(fraction * len(members))
        trains = [sign * rows[-1][i] for i in members if decision.active[i]]
        rests = [sign * rows[-1][i] for i in members if not decision.active[i]]
        assert not trains or not rests or min(trains) >= max(rests)


@pytest.mark.parametrize("policy", [policies.Top, policies.Bottom])
@given(run=runs(), fraction=st.floats(0, 1))
@settings(max_examples=80, deadline=None)
def test_protection_costs_no_more_units_than_it_must(make, policy, run, fraction):
    rows, kinds, layers = run
    history, table = make.history(rows), make.table(len(kinds), kinds, layers)
    decision = policy(fraction).decide(history, table, 0)
    groups = table.by_layer_and_kind()
    assert all(decision.active[members].any() for members in groups.values())
    for kind, members in table.by_kind().items():
        least = sum(k == kind for _, k in groups)
        trained = int(decision.active[members].sum())
        assert trained == max(round(fraction * len(members)), least)
    named = [r in ("ranked first", "protected") for r in decision.reasons]
    assert named == decision.active.tolist()


@given(run=runs(), alpha=st.sampled_from(["auto", 0.02, 0.3, 0.9]), protect=st.booleans())
@settings(max_examples=80, deadline=None)
def test_a_policys_share_is_kept_exactly_per_kind(make, run, alpha, protect):
    rows, kinds, layers = run
    table = make.table(len(kinds), kinds, layers)
    mat = policies.MAT(alpha, 0.05, protect=protect)
    for t in range(len(rows)):
        history = make.history(rows[: t + 1])
        counts = mat.decide(history, table, t).by_kind()
        for control in (policies.Top, policies.Bottom):
            chosen = control(mat, protect=protect).decide(history, table, t)
            assert chosen.by_kind() == counts


def test_top_and_bottom_by_hand(make):
    history = make.history([[5.0, 9.0, 1.0, 7.0, 2.0, 3.0]])
    table = make.table(6, layers=("a", "a", "a", "b", "b", "b"))
    top = policies.Top(1 / 3).decide(history, table, 0)
    assert top.active.nonzero().flatten().tolist() == [1, 3]
    assert top.summary() == "head: 2 of 6 train (4 outranked)"
    bottom = policies.Bottom(0.5).decide(history, table, 0)
    assert bottom.active.nonzero().flatten().tolist() == [2, 4, 5]
    alone = policies.Bottom(1 / 6).decide(history, table, 0)
    assert alone.active.nonzero().flatten().tolist() == [2, 4]
    assert alone.reasons[4] == "protected"
    assert alone.reasons[2] == "ranked first"


def test_ranks_follow_the_criterion_per_flop(make):
    history = make.history([[8.0, 6.0, 4.0]])
    table = make.table(3, cost=(8, 3, 1))
    assert policies.Top(1 / 3, per_flop=True).decide(history, table, 0).active.tolist() == [
        False,
        False,
        True,
    ]


def test_equals_train_in_order(make):
    history, table = make.history([[3.0, 3.0, 3.0]]), make.table(3)
    for policy in (policies.Top(1 / 3), policies.Bottom(1 / 3)):
        assert policy.decide(history, table, 0).active.tolist() == [True, False, False]


def test_what_a_share_that_is_a_policy_needs_is_passed_on(make):
    budgeted = policies.Top(policies.MAT(budget=0.8))
    assert budgeted.budget == 0.8
    assert policies.Top(0.5).budget is None
    assert policies.Bottom(0.5, criterion="trainability").needs_alignment
    assert policies.Bottom(policies.MAT(criterion="trainability")).needs_alignment
    assert not policies.Bottom(policies.MAT()).needs_alignment
    with pytest.raises(ValueError, match="alpha names the kind 'haed'"):
        policies.Top(policies.MAT({"haed": 0.1})).check_units(make.table(2))
    assert isinstance(budgeted, policies.Policy)
    assert budgeted.needs_spectra


def test_a_ranking_is_a_pure_function(make):
    history, table = make.history([[5.0, 9.0, 1.0]]), make.table(3)
    policy = policies.Bottom(policies.MAT("auto"))
    first = policy.decide(history, table, 0)
    assert pickle.loads(pickle.dumps(policy)).decide(history, table, 0) == first
    assert torch.equal(history.lambda_max, make.history([[5.0, 9.0, 1.0]]).lambda_max)
    with pytest.raises(ValueError, match="history is empty"):
        policy.decide(History(), table, 0)


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan"), "half", None])
def test_a_fraction_that_is_none_is_refused(fraction):
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\], or a policy, got"):
        policies.Top(fraction)


def test_a_class_in_the_place_of_a_policy_is_named_at_once():
    with pytest.raises(TypeError, match=r"got the class Random: make one of it"):
        policies.Top(policies.Random)
