"""Extent: how large the samples of a batch are, so that costs per sample can be compared."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from lightning_mat.mntk.samples import shapes_of


class Extent(NamedTuple):
    """How large the samples of a batch are, padding and all.

    What a unit costs is counted in a probe, what a step costs in training. A probe's samples are
    padded to the longest of many, those of a step to the longest of few.

    Attributes:
        elements: Of the largest tensor, per sample; 0.0 where there is none.
        form: Dimensions of each tensor: what batches of one kind have in common.
    """

    elements: float = 0.0
    form: tuple[int, ...] = ()

    @staticmethod
    def of(batch: Any) -> Extent:
        """Return the extent of a batch.

        Example:
            >>> import torch
            >>> Extent.of((torch.zeros(8, 3, 5), torch.zeros(8)))
            Extent(elements=15.0, form=(3, 1))
        """
        shapes = shapes_of(batch)
        samples = min((shape[0] for shape in shapes), default=0)
        most = max((math.prod(shape) for shape in shapes), default=0)
        return Extent(most / samples if samples else 0.0, tuple(map(len, shapes)))

    def over(self, other: Extent) -> float:
        """Return how much larger the samples are than another batch's, 1.0 for other kinds of them.

        Example:
            >>> words = Extent(30.0, (2,))
            >>> words.over(Extent(60.0, (2,))), words.over(Extent(60.0, (4, 1)))
            (0.5, 1.0)
        """
        alike = self.form == other.form and self.elements and other.elements
        return self.elements / other.elements if alike else 1.0
