"""Partition: who owns what, what trains, and what it refuses."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_mat.units import Block, Partition, Rect, Slice, Unit
from tests.units.closure import elements


def model() -> nn.Module:
    """Two linear layers, a tied third, and a scalar."""
    net = nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(6, 4), "c": nn.Linear(4, 6)})
    net["c"].weight = net["a"].weight
    net.register_parameter("scale", nn.Parameter(torch.ones(())))
    return net


def unit(name: str, *slices: Slice, kind: str = "ffn", layer: str = "") -> Unit:
    return Unit(name, kind, layer, slices)


def crossing() -> Partition:
    """Unit x owns rows of a.weight; y columns of what is below, and something of b."""
    return Partition(
        [
            unit("x", Slice("a.weight", 0, 0, 2), Slice("a.bias", 0, 0, 2)),
            unit("y", Slice("a.weight", 0, 2, 4), Slice("b.weight", 1, 1, 3), layer="l"),
            unit("z", Slice("b.weight", 1, 3, 6), kind="head"),
        ],
        model(),
    )


def covered(part: Partition, param: str, active) -> torch.Tensor:
    shape = part.shapes[param]
    mask = torch.zeros(shape, dtype=torch.int64)
    view = mask.view(shape[0] if shape else 1, -1)
    for block in part.active_blocks(param, active):
        for r in block.rects():
            view[r.r0 : r.r1, r.c0 : r.c1] += 1
    return mask


def test_names_kinds_layers_and_sizes_are_in_order():
    part = crossing()
    assert (part.names, part.kinds) == (("x", "y", "z"), ("ffn", "ffn", "head"))
    assert part.layers == ("", "l", "")
    assert part.numel.tolist() == [10, 16, 12]
    assert part.numel.dtype == torch.int64
    assert len(part) == len(list(part)) == 3


def test_what_no_unit_owns_is_the_remainder_or_free():
    part = crossing()
    assert part.remainder == ("scale", "b.bias", "c.bias")
    assert part.free_blocks("a.weight") == (Block(((4, 6),), ((0, 4),)),)
    assert part.free_blocks("b.weight") == (Block(((0, 4),), ((0, 1),)),)
    assert part.owners["a.weight"] == ((0, Rect(0, 2, 0, 4)), (1, Rect(2, 4, 0, 4)))


@given(st.lists(st.booleans(), min_size=3, max_size=3))
def test_active_blocks_cover_exactly_what_trains(active):
    part, net = crossing(), model()
    resting = elements(net, [u for u, on in zip(part, active, strict=True) if not on])
    for name, shape in part.shapes.items():
        expected = ~resting.get(name, torch.zeros(shape, dtype=torch.bool))
        for flags in (active, torch.tensor(active)):
            assert torch.equal(covered(part, name, flags), expected.long()), name
        assert part.rests_whole(name, active) == (not expected.any())


def test_a_parameter_that_all_its_owners_rest_rests_whole():
    part = Partition(
        [unit("x", Slice("b.weight", 1, 0, 3)), unit("y", Slice("b.weight", 1, 3, 6))], model()
    )
    assert part.rests_whole("b.weight", [False, False])
    assert not part.rests_whole("b.weight", [False, True])
    assert not part.rests_whole("b.bias", [False, False])


def test_tied_parameters_are_owned_under_the_first_name():
    part = Partition([unit("x", Slice("c.weight", 0, 0, 3))], model())
    assert part.aliases["c.weight"] == "a.weight"
    assert list(part.owners) == ["a.weight"]
    assert "c.weight" not in part.shapes
    both = Partition([unit("x", Slice("c.weight"), Slice("a.weight"))], model())
    assert both.numel.tolist() == [24]


def test_crossing_slices_of_one_unit_count_once():
    part = Partition([unit("x", Slice("a.weight", 0, 0, 2), Slice("a.weight", 1, 0, 2))], model())
    assert part.numel.tolist() == [2 * 4 + 4 * 2]
    assert int(covered(part, "a.weight", [True]).sum()) == 24
    assert int(covered(part, "a.weight", [False]).sum()) == 8
    assert int(covered(part, "a.weight", [False]).max()) == 1


def test_a_scalar_is_one_element():
    part = Partition([unit("x", Slice("scale"))], model())
    assert part.numel.tolist() == [1]
    assert part.rests_whole("scale", [False])
    assert part.active_blocks("scale", [True]) == (Block(((0, 1),), ((0, 1),)),)


def test_frozen_parameters_train_in_no_unit_and_are_no_remainder():
    net = model()
    net["b"].requires_grad_(False)
    part = Partition([unit("x", Slice("a.weight"))], net)
    assert part.frozen == ("b.weight", "b.bias")
    assert part.remainder == ("scale", "a.bias", "c.bias")
    assert part.active_blocks("b.weight", [True]) == ()
    with pytest.raises(ValueError, match=r"unit 'x' owns a slice of 'b.weight', which is frozen"):
        Partition([unit("x", Slice("b.weight"))], net)


@pytest.mark.parametrize(
    ("units", "complaint"),
    [
        ([unit("x", Slice("d.weight"))], "unit 'x' .* 'd.weight', which is not a parameter"),
        ([unit("x", Slice("a.bias")), unit("x", Slice("b.bias"))], "two units are named 'x'"),
        ([unit("x", Slice("a.weight", 0, 4, 9))], "unit 'x': slice .* does not fit 'a.weight'"),
        (
            [unit("x", Slice("a.weight", 0, 0, 3)), unit("y", Slice("c.weight", 1, 1, 2))],
            "units 'x' and 'y' both own elements of 'a.weight' "
            r"\(rows 0:3, columns 0:4 and rows 0:6, columns 1:2\)",
        ),
    ],
)
def test_units_that_cannot_be_are_refused_by_name(units, complaint):
    with pytest.raises(ValueError, match=complaint):
        Partition(units, model())


@pytest.mark.parametrize(
    "active", [[True], [True] * 4, [1, 0, 1], torch.ones(3), np.ones((3, 1), dtype=bool)]
)
def test_flags_of_the_wrong_length_or_type_are_refused(active):
    with pytest.raises(ValueError, match=r"active must be a bool tensor of shape \[3\]"):
        crossing().check_active(active)


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, np.array])
def test_flags_are_taken_in_every_usual_form(kind):
    flags = crossing().check_active(kind([True, False, True]))
    assert torch.equal(flags, torch.tensor([True, False, True]))


def test_a_partition_holds_no_tensor_and_survives_pickling():
    part = crossing()
    assert part.numel is not None
    assert part.free_blocks("a.weight")
    copy = pickle.loads(pickle.dumps(part))
    assert not any(isinstance(v, torch.Tensor) for v in copy.__dict__.values())
    assert copy.units == part.units
    assert copy.remainder == part.remainder
    assert torch.equal(copy.numel, part.numel)
    assert copy.active_blocks("b.weight", [True] * 3) == part.active_blocks("b.weight", [True] * 3)


def test_the_table_adds_up():
    net = model()
    net["b"].bias.requires_grad_(False)
    text = Partition([unit("x", Slice("a.weight", 0, 0, 3), layer="a")], net).describe()
    assert text.splitlines()[2:] == [
        "ffn              a          1          12           18.5%",
        "(always trains)                        49           75.4%",
        "(frozen by you)                         4            6.2%",
        "total                       1          65          100.0%",
    ]


def test_a_model_without_parameters_has_an_empty_partition():
    part = Partition([], nn.ReLU())
    assert (len(part), part.remainder, part.numel.tolist()) == (0, (), [])
    assert "total" in part.describe()


def test_a_parameter_without_elements_rests_and_clashes_with_nobody():
    net = nn.Module()
    net.w = nn.Parameter(torch.zeros(0, 5))
    part = Partition([unit("x", Slice("w")), unit("y", Slice("w"))], net)
    assert part.numel.tolist() == [0, 0]
    assert part.active_blocks("w", [True, True]) == ()
    assert Partition([], net).active_blocks("w", []) == ()
