"""Paired statistics, by cases computed by hand."""

import math

import pytest

from benchmarks.suites.stats import Estimate, differences, estimate, reached, value_at

CURVE = [
    {"loss": 5.0, "accuracy": 0.2, "seconds": 10.0, "flops": 100.0},
    {"loss": 4.0, "accuracy": 0.6, "seconds": 20.0, "flops": 300.0},
    {"loss": 4.5, "accuracy": 0.5, "seconds": 30.0, "flops": 500.0},
    {"loss": 3.5, "accuracy": 0.8, "seconds": 40.0, "flops": 700.0},
]


def test_three_values():
    # Mean 2, standard deviation 1, error 1/√3; t(0.975, 2) = 4.303.
    found = estimate([1.0, 2.0, 3.0])
    assert found.n == 3
    assert found.mean == 2
    assert found.error == pytest.approx(0.57735, abs=1e-5)
    assert found.low == pytest.approx(2 - 4.303 * 0.57735, abs=1e-4)
    assert found.high == pytest.approx(2 + 4.303 * 0.57735, abs=1e-4)
    assert found.covers_zero
    assert not estimate([2.0, 2.1, 1.9]).covers_zero
    assert not estimate([-2.0, -2.1, -1.9]).covers_zero


def test_two_values_have_the_widest_interval():
    # Error 0.5, t(0.975, 1) = 12.706.
    found = estimate([1.0, 2.0])
    assert found.low == pytest.approx(1.5 - 6.353)
    assert found.covers_zero


def test_one_value_shows_nothing():
    found = estimate([5.0])
    assert found.n == 1
    assert found.mean == 5
    assert math.isnan(found.error)
    assert found.covers_zero
    assert estimate([]).n == 0
    assert math.isnan(estimate([]).mean)


def test_equal_differences_have_no_width():
    assert estimate([0.5, 0.5, 0.5]) == Estimate(3, 0.5, 0.0, 0.5, 0.5)
    assert not estimate([0.5, 0.5]).covers_zero
    assert estimate([0.0, 0.0]).covers_zero


def test_many_values_take_the_normal_quantile():
    values = [float(i % 2) for i in range(40)]
    found = estimate(values)
    assert found.high - found.mean == pytest.approx(1.96 * found.error)
    assert estimate(values[:31]).high - estimate(values[:31]).mean == pytest.approx(
        2.042 * estimate(values[:31]).error
    )


def test_differences_pair_by_seed():
    assert differences({2: 5.0, 0: 1.0, 1: None}, {0: 0.5, 1: 3.0, 2: 7.0}) == [0.5, -2.0]
    assert differences({0: 1.0}, {1: 1.0}) == []
    assert differences({0: 1.0}, {0: None}) == []


def test_a_target_is_reached_between_points():
    assert reached(CURVE, "loss", 4.75, "seconds", more=False) == 12.5
    assert reached(CURVE, "loss", 4.75, "flops", more=False) == 150
    assert reached(CURVE, "loss", 4.0, "seconds", more=False) == 20
    # The first crossing counts, though the curve comes back.
    assert reached(CURVE, "loss", 4.25, "seconds", more=False) == 17.5
    assert reached(CURVE, "accuracy", 0.4, "seconds", more=True) == 15
    assert reached(CURVE, "accuracy", 0.7, "seconds", more=True) == pytest.approx(30 + 20 / 3)


def test_a_target_that_the_first_point_has_or_no_point_gets_to():
    assert reached(CURVE, "loss", 6.0, "seconds", more=False) == 10
    assert reached(CURVE, "loss", 3.0, "seconds", more=False) is None
    assert reached([], "loss", 3.0, "seconds", more=False) is None


def test_points_without_a_value_are_not_interpolated_over():
    curve = [CURVE[0], {"loss": None, "seconds": 20.0}, CURVE[3]]
    assert reached(curve, "loss", 4.0, "seconds", more=False) == 40
    assert value_at(curve, "loss", "seconds", 35.0, more=False) == 5.0


def test_the_best_value_by_a_cost():
    assert value_at(CURVE, "loss", "seconds", 15.0, more=False) == 4.5
    assert value_at(CURVE, "loss", "seconds", 30.0, more=False) == 4.0
    assert value_at(CURVE, "loss", "seconds", 35.0, more=False) == 4.0
    assert value_at(CURVE, "loss", "seconds", 39.0, more=False) == pytest.approx(3.6)
    assert value_at(CURVE, "accuracy", "flops", 700.0, more=True) == 0.8
    assert value_at(CURVE, "loss", "seconds", 9.0, more=False) is None
