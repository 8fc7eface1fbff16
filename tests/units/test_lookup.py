"""Lookup: linear layers are found by path, through wrappers, in both storage orders."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_mat.units import Slice
from lightning_mat.units.lookup import LinearMap, Lookup, join


class Conv1D(nn.Module):
    """Hugging Face's: y = x W + b, with W of shape [in, out]."""

    def __init__(self, nf: int, nx: int):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.zeros(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))


def test_both_storage_orders_are_linear_maps():
    lookup = Lookup(nn.ModuleDict({"a": nn.Linear(3, 5), "b": Conv1D(5, 3)}))
    assert lookup.linear("", "a") == LinearMap("a.weight", "a.bias", 5, 3)
    assert lookup.linear("", "b") == LinearMap("b.weight", "b.bias", 5, 3, out_dim=1)
    assert lookup.linear("", "b").outputs(1, 2) == (
        Slice("b.weight", 1, 1, 2),
        Slice("b.bias", 0, 1, 2),
    )
    assert lookup.linear("", "b").inputs(1, 2) == (Slice("b.weight", 0, 1, 2),)


@pytest.mark.parametrize("other", [nn.Embedding(4, 4), nn.Conv2d(4, 4, 1), nn.LayerNorm(4)])
def test_other_layers_are_no_linear_maps(other):
    assert Lookup(nn.ModuleDict({"a": other})).linear("", "a") is None


def test_wrappers_are_passed_through_and_not_listed():
    inner = nn.ModuleDict({"fc": nn.Linear(2, 2)})
    model = nn.Sequential(torch.compile(inner, backend="eager"))
    lookup = Lookup(model)
    assert [path for path, _ in lookup] == ["", "0._orig_mod", "0._orig_mod.fc"]
    assert lookup.find("", "0.fc") == ("0._orig_mod.fc", inner["fc"])
    assert lookup.find("", "0.nothing") is None


def test_paths_join_without_stray_dots():
    assert [join("a", "b"), join("", "b"), join("a", ""), join("", "")] == ["a.b", "b", "a", ""]
