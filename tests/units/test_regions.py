"""Regions: rectangle arithmetic against brute-force boolean masks."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_mat.units import Block, Rect
from lightning_mat.units.regions import complement, disjoint, first_overlap, merge_runs, union

ROWS, COLUMNS = 7, 6


@st.composite
def rect(draw) -> Rect:
    rows = sorted(draw(st.tuples(st.integers(0, ROWS), st.integers(0, ROWS))))
    columns = sorted(draw(st.tuples(st.integers(0, COLUMNS), st.integers(0, COLUMNS))))
    return Rect(*rows, *columns)


rects = st.lists(rect(), max_size=6)


def counts(rectangles) -> torch.Tensor:
    """How many rectangles cover each element."""
    total = torch.zeros(ROWS, COLUMNS, dtype=torch.int64)
    for r in rectangles:
        total[r.r0 : r.r1, r.c0 : r.c1] += 1
    return total


def parts(blocks) -> list[Rect]:
    return [r for block in blocks for r in block.rects()]


def is_merged(runs) -> bool:
    """Runs are not empty, and neither touch nor overlap."""
    return all(a < b for a, b in runs) and all(
        runs[i][1] < runs[i + 1][0] for i in range(len(runs) - 1)
    )


@given(rects)
def test_union_covers_each_element_once(some):
    blocks = union(some)
    assert torch.equal(counts(parts(blocks)), (counts(some) > 0).long())
    assert all(is_merged(b.rows) and is_merged(b.columns) for b in blocks)
    assert all(b.rows and b.columns for b in blocks)


@given(rects)
def test_complement_covers_the_rest_once(some):
    blocks = complement(some, ROWS, COLUMNS)
    assert torch.equal(counts(parts(blocks)), (counts(some) == 0).long())
    assert all(is_merged(b.rows) and is_merged(b.columns) for b in blocks)


@given(rects)
def test_rows_alone_and_columns_alone_give_one_block(some):
    for whole in (
        [Rect(r.r0, r.r1, 0, COLUMNS) for r in some],
        [Rect(0, ROWS, r.c0, r.c1) for r in some],
    ):
        assert len(union(whole)) == (1 if any(r.numel for r in whole) else 0)


@given(rects)
def test_disjoint_rectangles_have_the_same_union(some):
    assert torch.equal(counts(disjoint(some)), (counts(some) > 0).long())


@given(st.lists(st.tuples(rect(), st.integers(0, 2)), max_size=6))
def test_an_overlap_is_found_exactly_where_two_owners_meet(owned):
    some, owners = [r for r, _ in owned], [o for _, o in owned]
    covered = [counts(r for r, o in owned if o == owner) > 0 for owner in range(3)]
    clash = first_overlap(some, owners)
    assert (clash is not None) == bool((sum(c.long() for c in covered) > 1).any())
    if clash is not None:
        a, b = clash
        assert owners[a] != owners[b]
        assert (counts([some[a], some[b]]) > 1).any()


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)).map(sorted).map(tuple)))
def test_merged_runs_cover_the_same(runs):
    runs = [r for r in runs if r[0] < r[1]]
    merged = merge_runs(runs)
    assert is_merged(merged)
    assert {i for a, b in merged for i in range(a, b)} == {i for a, b in runs for i in range(a, b)}


@given(rects)
def test_block_sizes_are_those_of_their_rectangles(some):
    for block in union(some):
        assert block.numel == sum(r.numel for r in block.rects())
        assert block.numel == block.n_rows * block.n_columns


def test_nothing_is_left_of_a_parameter_without_elements():
    assert complement([], 0, 5) == complement([], 5, 0) == ()
    assert union([Rect(0, 5, 0, 0), Rect(0, 0, 0, 5)]) == union([]) == ()
    assert complement([], 2, 3) == (Block(((0, 2),), ((0, 3),)),)
