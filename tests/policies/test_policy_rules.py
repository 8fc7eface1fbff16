"""Equations 4 to 6, the gap, protection: one by one, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mat.policies.protect import protected, strongest
from lightning_mat.policies.temporal import settled
from lightning_mat.policies.threshold import eigenvalue_threshold, gap_threshold


def test_threshold_is_equation_4_over_all_eigenvalues_of_the_kind():
    # Λ̃ runs from 2 (the smallest of the second unit) to 1002: 2 + 1000 · 0.1.
    assert eigenvalue_threshold([1002.0, 500.0], [4.0, 2.0], 0.1) == pytest.approx(102.0, rel=1e-15)


@given(st.floats(1e-300, 1e300), st.floats(0, 1))
def test_threshold_never_rounds_above_the_largest_eigenvalue(high, ratio):
    low = high * ratio
    assert eigenvalue_threshold([high], [low], math.nextafter(1.0, 0.0)) <= high


@given(
    st.lists(st.floats(1e-300, 1e300), min_size=1, max_size=8),
    st.floats(0, 1, exclude_min=True, exclude_max=True),
    st.floats(0, 1),
)
def test_threshold_lies_between_the_extremes(lambda_max, alpha, ratio):
    lambda_min = [value * ratio for value in lambda_max]
    threshold = eigenvalue_threshold(lambda_max, lambda_min, alpha)
    assert min(lambda_min) <= threshold <= max(lambda_max)


def test_gap_threshold_is_the_middle_of_the_widest_log_gap():
    # Decades: 0, 1, then 4, 5: the widest gap is from 10 to 10⁴, its middle 10^2.5.
    assert gap_threshold([1e5, 10.0, 1e4, 1.0]) == pytest.approx(10**2.5, rel=1e-12)


def test_gap_threshold_takes_the_lowest_of_equal_gaps():
    assert 1.0 < gap_threshold([1.0, 16.0, 256.0]) < 16.0


@pytest.mark.parametrize(
    "lambda_max",
    [[7.0], [0.0], [3.0, 3.0, 3.0], [0.0, 0.0], [0.0, 5.0], [1.0, 1.0005, 1.001]],
    ids=[
        "one unit",
        "one zero",
        "all equal",
        "all zero",
        "one positive",
        "within float32 accuracy",
    ],
)
def test_gap_threshold_rests_nobody_where_there_is_no_gap(lambda_max):
    assert all(value >= gap_threshold(lambda_max) for value in lambda_max)


def test_gap_threshold_leaves_zeros_out_of_the_search():
    threshold = gap_threshold([0.0, 1.0, 2.0, 1e6])
    assert threshold == pytest.approx(math.sqrt(2e6), rel=1e-12)


@given(st.lists(st.floats(1e-200, 1e200), min_size=1, max_size=12))
def test_gap_threshold_always_leaves_a_unit_training(lambda_max):
    assert max(lambda_max) >= gap_threshold(lambda_max)


def test_settled_is_equation_6_by_hand():
    # λ: 10, 6, 6.3 → Δ: 0, 4, 3.7; |3.7 − 4| = 0.3, and 0.3 / 4 = 0.075.
    series = torch.tensor([[10.0], [6.0], [6.3]], dtype=torch.float64)
    assert settled(series, 0.076).item()
    assert not settled(series, 0.074).item()


def test_settled_takes_the_variation_not_the_eigenvalue():
    # λ jumps from 6 to 14, but Δ = |λ − 10| stays 4: equation 6 calls it settled.
    series = torch.tensor([[10.0], [6.0], [14.0]], dtype=torch.float64)
    assert settled(series, 1e-6).item()


@pytest.mark.parametrize("probes", [1, 2])
def test_settled_begins_at_the_third_probe(probes):
    series = torch.tensor([[10.0], [6.0]], dtype=torch.float64)[:probes]
    assert not settled(series, 5.0).any()


def test_a_unit_whose_first_variation_is_zero_never_settles():
    series = torch.tensor([[10.0], [10.0], [10.0], [10.0]], dtype=torch.float64)
    assert not settled(series, 1e3).any()
    assert not settled(series, 1e3, permanent=True).any()


def test_beta_zero_settles_nobody():
    series = torch.tensor([[10.0], [6.0], [6.0]], dtype=torch.float64)
    assert not settled(series, 0.0).any()


def test_settled_is_taken_anew_unless_permanent():
    # Δ: 0, 4, 4 (settled), 8 (moves again).
    series = torch.tensor([[10.0], [6.0], [6.0], [2.0]], dtype=torch.float64)
    assert settled(series[:3], 0.1).item()
    assert not settled(series, 0.1).item()
    assert settled(series, 0.1, permanent=True).item()


def test_strongest_takes_one_unit_per_layer_and_kind_and_the_first_of_equals(make):
    units = make.table(
        6,
        kinds=("head", "head", "ffn", "ffn", "head", "head"),
        layers=("a", "a", "a", "a", "b", "b"),
    )
    lambda_max = torch.tensor([1.0, 2.0, 9.0, 8.0, 5.0, 5.0])
    assert strongest(lambda_max, units).tolist() == [False, True, True, False, True, False]


def test_protection_wakes_only_where_a_whole_layer_and_kind_rests(make):
    units = make.table(4, layers=("a", "a", "b", "b"))
    active = torch.tensor([True, False, False, False])
    wake = protected(active, torch.tensor([1.0, 2.0, 3.0, 4.0]), units)
    assert wake.tolist() == [False, False, False, True]


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_protection_leaves_no_layer_and_kind_resting(make, data):
    count = data.draw(st.integers(1, 12))
    units = make.table(
        count,
        kinds=data.draw(st.lists(st.sampled_from("hf"), min_size=count, max_size=count)),
        layers=data.draw(st.lists(st.sampled_from("abc"), min_size=count, max_size=count)),
    )
    active = torch.tensor(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    values = data.draw(st.lists(st.floats(0, 1e16), min_size=count, max_size=count))
    wake = protected(active, torch.tensor(values), units)
    assert not (wake & active).any()
    for members in units.by_layer_and_kind().values():
        assert (active | wake)[members].any()
        assert int(wake[members].sum()) == (0 if active[members].any() else 1)
