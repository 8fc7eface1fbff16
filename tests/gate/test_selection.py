"""Selection takes what indexing takes, and puts it back where it came from."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mat.gate.selection import Selection, place
from lightning_mat.units.regions import merge_runs

CPU = torch.device("cpu")


def runs_of(mask: list[bool]) -> tuple[tuple[int, int], ...]:
    return merge_runs((i, i + 1) for i, on in enumerate(mask) if on)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.booleans(), st.integers(0, 1))
def test_take_and_put_are_inverse_for_long_and_short_runs(lengths, first, dim):
    mask = [on for i, n in enumerate(lengths) for on in [(i % 2 == 0) == first] * n]
    some = Selection(runs_of(mask), len(mask), CPU)
    full = torch.arange(3.0 * len(mask)).view(3, -1)
    full = full.t() if dim == 0 else full
    index = torch.tensor(mask).nonzero().flatten()
    taken = some.take(full, dim) if len(some) else full.index_select(dim, index)
    assert torch.equal(taken, full.index_select(dim, index))
    back = torch.zeros_like(full)
    some.put(taken, back, dim)
    assert torch.equal(back.index_select(dim, index), taken)
    assert float(back.sum()) == float(taken.sum())


@given(st.lists(st.booleans(), min_size=1, max_size=16), st.data())
@settings(max_examples=60, deadline=None)
def test_within_counts_among_the_kept(kept_mask, data):
    mask = [on and data.draw(st.booleans()) for on in kept_mask]
    kept = Selection(runs_of(kept_mask), len(mask), CPU)
    inner = Selection(runs_of(mask), len(mask), CPU).within(kept)
    places = torch.tensor(kept_mask).nonzero().flatten().tolist()
    found = [places[i] for a, b in inner.runs for i in range(a, b)]
    assert found == [i for i, on in enumerate(mask) if on]
    assert inner.size == len(kept)


@pytest.mark.parametrize("step", [1, 3, 20])
def test_place_fills_rows_and_columns_and_nothing_else(step):
    mask = [(i // step) % 2 == 0 for i in range(60)]
    some_rows, some_columns = Selection(runs_of(mask), 60, CPU), Selection(((2, 3), (5, 7)), 9, CPU)
    target = torch.zeros(60, 9, 2)
    place(torch.ones(len(some_rows), 3, 2), target, some_rows, some_columns)
    expected = torch.zeros(60, 9, 2)
    expected[torch.tensor(mask).nonzero(), torch.tensor([2, 5, 6])] = 1
    assert torch.equal(target, expected)


def test_a_copy_does_not_keep_the_whole_tensor_alive():
    full = torch.randn(4, 100)
    copy = Selection(((10, 20),), 100, CPU).copy(full, 1)
    assert torch.equal(copy, full[:, 10:20])
    assert copy.untyped_storage().nbytes() == 4 * 10 * 4


def test_short_runs_are_copied_by_index_and_long_ones_run_by_run():
    short, long = (Selection(((0, n), (2 * n, 3 * n)), 4 * n, CPU) for n in (2, 64))
    assert short.indexed
    assert not long.indexed
    assert not Selection(((3, 4),), 9, CPU).indexed


def test_the_index_follows_a_model_that_moved():
    some = Selection(((0, 1), (2, 3)), 4, CPU)
    assert some.index(torch.device("meta")).device.type == "meta"
    assert some.take(torch.zeros(2, 4, device="meta"), 1).shape == (2, 2)
