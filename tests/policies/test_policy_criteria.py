"""Criteria, one by one, and policies.MAT by them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mat import policies
from lightning_mat.mntk.spectra import Spectra
from lightning_mat.policies import History, criterion_values
from lightning_mat.policies.criteria import CRITERIA, criterion_floors, criterion_label

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def measured(rows, alignment):
    """Return the history of one probe with these spectra and alignments."""
    values = torch.tensor(rows, dtype=torch.float64)
    names = tuple(f"u{i}" for i in range(len(rows)))
    history = History()
    aligned = torch.tensor(alignment, dtype=torch.float64)
    history.append(Spectra(names, values, torch.ones(len(rows)), None, aligned), 0, 0)
    return history


@pytest.fixture
def history():
    """Return a probe of four units, the last of which has no gradient at all."""
    rows = [[8.0, 1.0, 1.0], [6.0, 3.0, 3.0], [4.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    return measured(rows, [0.5, 2.0, 3.0, 0.0])


def test_values_and_floors_by_hand(make, history):
    table = make.table(4, cost=(2, 4, 8, 1))
    expected = {
        "lambda_max": ([8, 6, 4, 0], [1, 3, 0, 0]),
        "coherence": ([0.8, 0.5, 1, 0], [0.1, 0.25, 0, 0]),
        "trainability": ([4, 12, 12, 0], [0, 0, 0, 0]),
    }
    for criterion, (values, floors) in expected.items():
        found = criterion_values(history, table, criterion)
        assert found.tolist() == [values]
        assert criterion_floors(history, table, criterion).tolist() == [floors]
        per_flop = criterion_values(history, table, criterion, per_flop=True)
        assert torch.equal(per_flop, found / table.cost)
    assert set(expected) == set(CRITERIA)


def test_what_costs_nothing_has_all_or_nothing_per_flop(make, history):
    table = make.table(4, cost=(0, 1, 0, 0))
    values = criterion_values(history, table, per_flop=True)
    assert values.tolist() == [[math.inf, 6, math.inf, 0]]
    with pytest.raises(ValueError, match="per_flop=True needs the cost"):
        criterion_values(history, make.table(4, cost=(0,) * 4), per_flop=True)


def test_an_unknown_criterion_or_an_alignment_that_was_not_measured_is_refused(make, history):
    with pytest.raises(ValueError, match="criterion must be one of .*, got 'trace'"):
        criterion_values(history, make.table(4), "trace")
    with pytest.raises(ValueError, match="needs the alignment of every probe, but 1 of 1"):
        criterion_values(make.history([[1.0, 2.0]]), make.table(2), "trainability")
    for build in (policies.MAT, lambda criterion: policies.Top(0.5, criterion=criterion)):
        with pytest.raises(ValueError, match="criterion must be one of"):
            build(criterion="trace")


@pytest.mark.parametrize(
    ("criterion", "active", "threshold"),
    [
        ("lambda_max", [True, True, False, False], 4.8),
        ("coherence", [True, False, True, False], 0.6),
        ("trainability", [False, True, True, False], 7.2),
    ],
)
def test_mat_compares_by_its_criterion(make, history, criterion, active, threshold):
    policy = policies.MAT(0.6, protect=False, criterion=criterion)
    assert policy.needs_alignment == (criterion == "trainability")
    decision = policy.decide(history, make.table(4), 0)
    assert decision.active.tolist() == active
    assert decision.thresholds["head"] == pytest.approx(threshold)
    label = criterion_label(criterion, False)
    assert decision.count(f"{label} ≥ λ_α") == sum(active)
    assert (f"({label})" in decision.summary()) == (criterion != "lambda_max")


def test_mat_per_flop_lets_what_costs_nothing_train_and_place_no_threshold(make, history):
    table = make.table(4, cost=(0, 1, 2, 1))  # per FLOP: Inf, 6, 2, 0
    policy = policies.MAT(0.5, protect=False, per_flop=True)
    decision = policy.decide(history, table, 0)
    assert decision.thresholds == {"head": 3.0}
    assert decision.active.tolist() == [True, True, False, False]
    kinds = ("free", "head", "head", "head")
    decision = policy.decide(history, make.table(4, kinds, cost=(0, 1, 2, 1)), 0)
    assert decision.thresholds == {"free": 0.0, "head": 3.0}
    assert decision.active.tolist() == [True, True, False, False]


def test_the_temporal_policy_follows_the_criterion(make):
    # λ_max moves by as much in every episode, coherence stands still from the second probe on.
    history = History()
    for t, (first, rest) in enumerate([(8.0, 2.0), (12.0, 4.0), (15.0, 5.0), (18.0, 6.0)]):
        history.append(make.spectra([[first, rest], [9.0 + t, 1.0]]), t, t)
    table = make.table(2)
    by_size = policies.MAT(0.01, 0.1, protect=False).decide(history, table, 3)
    by_share = policies.MAT(0.01, 0.1, protect=False, criterion="coherence").decide(
        history, table, 3
    )
    assert by_size.active[0]
    assert by_share.reasons[0] == "temporal"


def test_a_budget_is_spent_by_the_criterion(make, history):
    table = make.table(4, cost=(10,) * 4, full_cost=100)
    spend = {
        criterion: policies.MAT(budget=0.7, protect=False, criterion=criterion)
        .decide(history, table, 0)
        .active.tolist()
        for criterion in CRITERIA
    }
    assert spend == {
        "lambda_max": [True, False, False, False],
        "coherence": [False, False, True, False],
        "trainability": [False, True, False, False],
    }
    with pytest.raises(ValueError, match="compares units per FLOP in any case"):
        policies.MAT(budget=0.7, per_flop=True)


@given(
    values=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8),
    scale=st.floats(1e-3, 1e3),
)
@settings(deadline=None)
def test_coherence_is_free_of_scale(make, values, scale):
    rows = [[v, v / 3, 0.1 * v * v / (1 + v)] for v in values]
    table = make.table(len(rows))
    plain, scaled = (
        measured([[x * s for x in row] for row in rows], [1.0] * len(rows)) for s in (1.0, scale)
    )
    torch.testing.assert_close(
        criterion_values(plain, table, "coherence"), criterion_values(scaled, table, "coherence")
    )


def test_a_history_keeps_alignments_and_loads_states_without_them(make, history):
    history.append(make.spectra([[1.0, 1.0, 1.0]] * 4), 10, 1)
    assert history.alignment[0].tolist() == [0.5, 2.0, 3.0, 0.0]
    assert history.alignment[1].isnan().all()
    restored = History()
    restored.load_state_dict(history.state_dict())
    assert torch.equal(restored.alignment.nan_to_num(-1), history.alignment.nan_to_num(-1))
    earlier = {k: v for k, v in history.state_dict().items() if k != "alignment"}
    restored.load_state_dict(earlier)
    assert restored.alignment.shape == (2, 4)
    assert restored.alignment.isnan().all()
    with pytest.raises(ValueError, match="alignment is NaN or Inf for 1 of 1"):
        measured([[1.0]], [math.nan])
