"""Which rows belong to which sample, measured and not guessed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_mat.mntk.layout import CrossSampleError, Layout, Ragged, find_layout, row_ids


@given(
    samples=st.integers(2, 5),
    tokens=st.integers(1, 6),
    order=st.sampled_from(["st", "ts", "merged", "merged minor"]),
)
def test_regular_orders_are_found_and_undone(samples: int, tokens: int, order: str) -> None:
    rows = torch.arange(samples * tokens).view(samples, tokens)  # row t of sample s
    owner = torch.arange(samples).view(-1, 1).expand(samples, tokens)
    arrange = {
        "st": lambda v: v,
        "ts": lambda v: v.T,
        "merged": lambda v: v.reshape(-1),
        "merged minor": lambda v: v.T.reshape(-1),
    }[order]
    layout = find_layout(arrange(owner), samples)
    assert layout is not None
    back = layout.to_samples(arrange(rows), arrange(rows).dim(), samples)
    assert torch.equal(back.sort(1).values, rows)


def test_rows_without_a_gradient_do_not_decide() -> None:
    ids = torch.tensor([[-1, 0, -1], [-1, -1, 1]])
    assert find_layout(ids, 2) == Layout(0)
    assert find_layout(torch.tensor([0, 1, 1, 1]), 2) is None
    assert find_layout(torch.tensor([0, 1, 1]), 2) is None


def _gradients(owner: Tensor, width: int) -> tuple[Tensor, Tensor]:
    plain = torch.randn(*owner.shape, width)
    return plain, plain * (owner + 1).unsqueeze(-1)


def test_ids_come_from_the_weights() -> None:
    owner = torch.tensor([[0, 3, 1], [2, 2, 0]])
    plain, weighted = _gradients(owner, 5)
    plain[0, 0], weighted[0, 0] = 0, 0
    found = row_ids(plain, weighted, 2, 4)
    assert found.tolist() == [[-1, 3, 1], [2, 2, 0]]
    plain[1, 1, 2] = float("nan")
    assert row_ids(plain, weighted, 2, 4).tolist() == [[-1, 3, 1], [2, -2, 0]]


def test_rounding_noise_is_not_taken_for_mixing() -> None:
    plain, weighted = _gradients(torch.tensor([0, 1, 0]), 8)
    plain[2], weighted[2] = 1e-8 * torch.randn(8), 1e-8 * torch.randn(8)
    assert row_ids(plain, weighted, 1, 2)[:2].tolist() == [0, 1]


def test_mixed_rows_are_refused() -> None:
    plain, weighted = _gradients(torch.tensor([0, 1, 0]), 8)
    weighted[1] = weighted[1] * 0.75
    with pytest.raises(CrossSampleError, match="1 of 3 rows"):
        row_ids(plain, weighted, 1, 2)


def test_a_row_that_cancels_in_the_plain_sum_is_mixed_too() -> None:
    plain, weighted = _gradients(torch.tensor([0, 1]), 8)
    plain[1] = 0
    with pytest.raises(CrossSampleError, match="1 of 2 rows"):
        row_ids(plain, weighted, 1, 2)


def test_ragged_rows_are_padded_by_sample() -> None:
    rows = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    ragged = Ragged(torch.tensor([2, 0, -1, 2]))
    assert ragged.to_samples(rows, 1, 3).squeeze(-1).tolist() == [[2, 0], [0, 0], [1, 4]]


def test_nothing_routed_is_an_empty_layer() -> None:
    plain = torch.zeros(0, 4)
    assert row_ids(plain, plain, 1, 3).shape == (0,)
    assert Ragged(torch.zeros(0, dtype=torch.long)).to_samples(plain, 1, 3).shape == (3, 1, 4)
