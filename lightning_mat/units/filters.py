"""Convolution filters as units.

Filter i of a convolution makes output channel i: row i of the weight (for grouped and depthwise
convolutions too, whose rows are shorter) and entry i of the bias. Transposed convolutions, whose
output channels are not rows, are left to the remainder.
"""

from __future__ import annotations

import re
from collections.abc import Set as AbstractSet

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from lightning_mat.units.lookup import Lookup, join
from lightning_mat.units.unit import Slice, Unit

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Filters:
    """Convolution filters: a row of the weight with its entry of the bias.

    Args:
        affine: Also own entry i of the weight and bias of the BatchNorm that follows. It is
            recognised by the order in which their parent holds them: the convolution, then one
            BatchNorm over as many channels. Where several convolutions, or several BatchNorms, are
            held in a row, which follows which is not known, and the affine stays in the remainder.

    Example:
        >>> from lightning_mat.units import partition
        >>> net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.ReLU())
        >>> partition(net, "filters").numel.tolist(), partition(net, Filters(True)).numel.tolist()
        ([28, 28], [30, 30])
    """

    word = "filters"

    def __init__(self, affine: bool = False) -> None:
        self.affine = affine

    def find(self, model: nn.Module, taken: AbstractSet[str]) -> list[Unit]:
        """Return one unit per output channel of every convolution of which nothing is taken."""
        lookup = Lookup(model)
        norms = following_norms(lookup) if self.affine else {}
        units = []
        for path, module in lookup:
            if not isinstance(module, CONVOLUTIONS):
                continue
            owned = lookup.own_parameters(path)
            if parametrize.is_parametrized(module, "weight"):
                continue  # its rows are computed from other parameters
            owned += lookup.own_parameters(norms[path]) if path in norms else []
            if not owned or not taken.isdisjoint(owned):
                continue
            units += [
                Unit(
                    join(path, f"filter.{i}"),
                    "filter",
                    path,
                    tuple(Slice(name, 0, i, i + 1) for name in owned),
                )
                for i in range(module.out_channels)
            ]
        return units

    def hint(self, model: nn.Module) -> str:
        """Say why convolutions have no filters that could be units."""
        found = [m for _, m in Lookup(model) if isinstance(m, CONVOLUTIONS)]
        if not any(parametrize.is_parametrized(m, "weight") for m in found):
            return ""
        return (
            "the weights of its convolutions are computed from other parameters "
            "(torch.nn.utils.parametrizations), so that no row of a parameter is a filter"
        )


def following_norms(lookup: Lookup) -> dict[str, str]:
    """Return {path of a convolution: path of the BatchNorm that reads its output}."""
    norms = {}
    for path, parent in lookup:
        children = [c for name, _ in parent.named_children() if (c := lookup.find(path, name))]
        order = "".join(
            "c" if isinstance(m, CONVOLUTIONS) else "n" if isinstance(m, _BatchNorm) else "."
            for _, m in children
        )
        for match in re.finditer("(?<!c)cn(?!n)", order):
            (conv_path, conv), (norm_path, norm) = children[match.start() : match.end()]
            if conv.out_channels == norm.num_features:
                norms[conv_path] = norm_path
    return norms
