"""Slice and Unit: what they own, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_mat.units import Slice, Unit
from lightning_mat.units.unit import matrix_shape


@given(st.data())
def test_a_slice_is_its_rectangle_of_the_matrix_view(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 4), max_size=4)))
    dim = data.draw(st.sampled_from([None, *range(min(max(len(shape), 1), 2))]))
    size = shape[dim] if dim is not None and shape else 1
    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.one_of(st.none(), st.integers(start + 1, size)))
    if dim is None:
        start, stop = 0, None
    expected = torch.zeros(shape, dtype=torch.bool)
    if dim is None or not shape:
        expected[...] = True
    else:
        expected.movedim(dim, 0)[start:stop] = True
    rect = Slice("w", dim, start, stop).rect(shape)
    view = torch.zeros(matrix_shape(shape), dtype=torch.bool)
    view[rect.r0 : rect.r1, rect.c0 : rect.c1] = True
    assert torch.equal(view.view(shape), expected)
    assert rect.numel == expected.sum()


@pytest.mark.parametrize(
    ("piece", "shape", "complaint"),
    [
        (Slice("w", None, 1), (4,), "has a range .* but dim=None"),
        (Slice("w", 1, 0, 1), (4,), "along dimension 1, but the parameter has shape"),
        (Slice("w", 2, 0, 1), (4, 4, 4), "along dimension 2"),
        (Slice("w", 0, 2, 2), (4,), "need 0 ≤ start < stop ≤ 4"),
        (Slice("w", 0, -1, 2), (4,), "does not fit"),
        (Slice("w", 1, 0, 5), (4, 4), "does not fit"),
    ],
)
def test_slices_that_do_not_fit_are_refused(piece, shape, complaint):
    with pytest.raises(ValueError, match=f"'w'.*{complaint}|{complaint}.*'w'"):
        piece.rect(shape)


def test_units_need_a_name_and_a_slice():
    with pytest.raises(ValueError, match="a unit needs a name"):
        Unit("", "head", "", (Slice("w"),))
    with pytest.raises(ValueError, match="unit 'a' owns no slice"):
        Unit("a", "head", "", ())


def test_a_units_elements_are_counted():
    unit = Unit("a", "head", "", [Slice("w", 1, 0, 2), Slice("b")])
    assert unit.slices == (Slice("w", 1, 0, 2), Slice("b"))
    assert unit.numel({"w": torch.Size((3, 4)), "b": torch.Size((5,))}) == 11
