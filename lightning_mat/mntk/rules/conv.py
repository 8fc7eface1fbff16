"""Per-sample gradients of convolutions in one, two and three dimensions."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mat.mntk.factors import Convolution, Dense, Factor, Geometry
from lightning_mat.mntk.rules.base import register_layer_rule

ConvNd = nn.Conv1d | nn.Conv2d | nn.Conv3d


@register_layer_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class ConvRule:
    """Convolutions with any stride, padding, padding mode, dilation and groups."""

    def item_dims(self, module: nn.Module) -> tuple[int, int]:
        """Images in, images out: channels and the spatial dimensions."""
        dims = 1 + len(cast(ConvNd, module).kernel_size)
        return dims, dims

    def factors(self, module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Factor]:
        """Return the factors of ``weight`` and ``bias``."""
        conv = cast(ConvNd, module)
        # (before, after) per dimension from the last to the first, for "same" and numbers alike
        padding = conv._reversed_padding_repeated_twice
        before = tuple(padding[-2::-2])
        if conv.padding_mode != "zeros":
            x = F.pad(x.flatten(0, 1), padding, mode=conv.padding_mode).unflatten(0, x.shape[:2])
            before = (0,) * len(before)
        geometry = Geometry(
            tuple(conv.kernel_size), tuple(conv.stride), tuple(conv.dilation), before, conv.groups
        )
        return {
            "weight": Convolution(geometry, x, grad),
            "bias": Dense(grad.flatten(3).sum((1, 3)).unsqueeze(-1)),
        }
