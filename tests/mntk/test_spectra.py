"""The scalars of a spectrum, by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_mat.mntk.spectra import Spectra


def spectra(*rows: list[float]) -> Spectra:
    values = torch.tensor(rows, dtype=torch.float64)
    return Spectra(tuple(f"u{i}" for i in range(len(rows))), values, torch.zeros(len(rows)))


def test_scalars_by_hand() -> None:
    s = spectra([4.0, 2.0, 1.0], [3.0, 3.0, 3.0], [5.0, 0.0, 0.0], [0.0, 0.0, 0.0])
    assert s.lambda_max.tolist() == [4, 3, 5, 0]
    assert s.lambda_min.tolist() == [1, 3, 0, 0]
    assert s.trace.tolist() == [7, 9, 5, 0]
    assert s.condition_number.tolist() == [4, 1, float("inf"), float("inf")]
    assert s.effective_rank.tolist() == pytest.approx([2.6005, 3.0, 1.0, 0.0], abs=1e-4)


def test_rounding_noise_at_the_low_end_is_zero() -> None:
    s = spectra([1e12, 1.0, -1e-6], [1e12, 1.0, 1e-5])
    assert s.lambda_min.tolist() == [0, 1e-5]
    assert s.condition_number.tolist() == [float("inf"), float("inf")]


def test_nan_stays_nan() -> None:
    s = spectra([float("nan")] * 3, [2.0, 1.0, 1.0])
    assert s.finite.tolist() == [False, True]
    for scalar in (s.lambda_max, s.lambda_min, s.trace, s.condition_number, s.effective_rank):
        assert scalar.isnan().tolist() == [True, False]


@given(st.lists(st.floats(0, 1e16), min_size=2, max_size=9))
def test_effective_rank_lies_between_one_and_the_rank(values: list[float]) -> None:
    row = sorted(values, reverse=True)
    rank: Tensor = spectra(row).effective_rank
    positive = sum(v > 0 for v in row)
    assert (rank <= positive + 1e-6).all()
    assert (rank >= min(1, positive) - 1e-6).all()
