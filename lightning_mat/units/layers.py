"""Whole layers as units: every module that holds parameters of its own."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from torch import nn

from lightning_mat.units.lookup import Lookup, block_around
from lightning_mat.units.unit import Slice, Unit


class Layers:
    """Layers of any type, each with all the parameters that it holds itself.

    A tied parameter belongs to the layer under whose name ``model.named_parameters()`` lists it.
    The ``layer`` of these units is the block around them (``encoder.layer.3``), or the model where
    there is none, so that the protecting rule keeps one of several layers training.

    Example:
        >>> from lightning_mat.units import partition
        >>> mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> part = partition(mlp, Layers())
        >>> part.names, part.numel.tolist()
        (('0', '2'), [40, 18])
    """

    word = "layers"

    def find(self, model: nn.Module, taken: AbstractSet[str]) -> list[Unit]:
        """Return one unit per module that holds a parameter of which nothing is taken."""
        lookup = Lookup(model)
        listed = {name for name, _ in model.named_parameters()}
        units = []
        for path, module in lookup:
            owned = [n for n in lookup.own_parameters(path) if n in listed and n not in taken]
            if owned:
                around = block_around(path)
                units.append(
                    Unit(path or type(module).__name__, "layer", around, tuple(map(Slice, owned)))
                )
        return units
