"""Filters: each unit is what makes one output channel, proved by gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_mat.units import Filters, partition
from tests.units.closure import elements


def _assert_channels(model: nn.Module, x: torch.Tensor, units) -> None:
    """Channel i of the model's output depends on unit i and on nothing else of the units."""
    names = list(elements(model, units))
    for i, unit in enumerate(units):
        found = torch.autograd.grad(
            model(x)[:, i].sin().sum(), [model.get_parameter(n) for n in names]
        )
        own = elements(model, [unit])
        for name, grad in zip(names, found, strict=True):
            assert torch.equal(grad != 0, own[name]), (unit.name, name)


@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (nn.Conv1d(3, 4, 3), (2, 3, 9)),
        (nn.Conv2d(3, 4, 3, stride=2, padding=1, dilation=2), (2, 3, 9, 9)),
        (nn.Conv2d(4, 6, 3, groups=2, bias=False), (2, 4, 6, 6)),
        (nn.Conv2d(4, 8, 3, groups=4), (2, 4, 6, 6)),
        (nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
    ],
    ids=["1d", "2d", "grouped", "depthwise", "3d"],
)
def test_each_unit_makes_one_channel(conv, shape):
    model = conv.double()
    part = partition(model, "filters")
    assert part.names == tuple(f"filter.{i}" for i in range(conv.out_channels))
    assert set(part.kinds) == {"filter"}
    assert part.remainder == ()
    _assert_channels(model, torch.randn(shape, dtype=torch.float64), list(part))


def test_the_affine_of_the_batch_norm_behind_belongs_to_the_filter_if_asked():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)).double().eval()
    model[1].running_mean.uniform_(0.5, 1)
    part = partition(model, Filters(affine=True))
    assert part.remainder == ()
    assert part.layers == ("0",) * 4
    _assert_channels(model, torch.randn(2, 3, 6, 6, dtype=torch.float64), list(part))
    assert partition(model, "filters").remainder == ("1.weight", "1.bias")


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)],
        [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)],
        [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)],
        [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(2)],
    ],
    ids=["two-norms", "two-convolutions", "not-adjacent", "other-width"],
)
def test_where_the_order_does_not_tell_the_affine_stays_in_the_remainder(layers):
    part = partition(nn.Sequential(*layers), Filters(affine=True))
    norms = [i for i, m in enumerate(layers) if isinstance(m, nn.BatchNorm2d)]
    assert part.remainder == tuple(f"{i}.{p}" for i in norms for p in ("weight", "bias"))


def test_a_batch_norm_without_affine_adds_nothing():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False))
    assert partition(model, Filters(affine=True)).numel.tolist() == [28] * 4


def test_transposed_convolutions_always_train():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 2, 3))
    assert partition(model, "filters").remainder == ("1.weight", "1.bias")


def test_convolutions_of_experts_are_left_to_them():
    experts = nn.ModuleList(nn.Conv2d(2, 2, 1) for _ in range(2))
    model = nn.ModuleDict({"experts": experts, "conv": nn.Conv2d(2, 2, 1)})
    part = partition(model, "filters+experts")
    assert part.kinds == ("expert", "expert", "filter", "filter")
    assert part.names[-1] == "conv.filter.1"


def _torchvision():
    try:
        import torchvision.models
    except Exception as error:  # a wheel made for another torch fails in several ways
        pytest.skip(f"torchvision does not import beside this torch: {error}")
    return torchvision.models


def test_vgg_is_cut_into_its_filters():
    with torch.device("meta"):
        model = _torchvision().vgg11()
    part = partition(model)
    assert len(part) == 64 + 128 + 256 * 2 + 512 * 4
    assert part.units[0].name == "features.0.filter.0"
    assert part.layers[64] == "features.3"
    assert part.numel[:2].tolist() == [28, 28]
    assert part.remainder == tuple(
        f"classifier.{i}.{p}" for i in (0, 3, 6) for p in ("weight", "bias")
    )


def test_resnet_is_cut_into_its_filters_with_and_without_the_affine():
    with torch.device("meta"):
        model = _torchvision().resnet18()
    part = partition(model, "filters")
    assert len(part) == 4800
    assert "layer2.0.downsample.0.filter.127" in part.names
    assert {n for n in part.remainder if ".bn" in n or n.startswith("bn")}
    assert partition(model, Filters(affine=True)).remainder == ("fc.weight", "fc.bias")
