"""Per-sample gradients of convolutions in one, two and three dimensions."""

from __future__ import annotations

from math import prod
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mat.mntk.factors import Dense, Factor, Outer, Transposed
from lightning_mat.mntk.rules.base import register_layer_rule

ConvNd = nn.Conv1d | nn.Conv2d | nn.Conv3d

# Bytes that the unfolded patches of some samples may take at a time.
_PATCH_BYTES = 64 << 20


class Convolution:
    r"""Per-sample gradients of a convolution's weight, unfolding a few samples at a time.

    With patches :math:`P_s` of shape [positions, C/g·k] and output gradients :math:`B_s` of shape
    [O/g, positions], each group's gradient is :math:`G_s = B_s P_s`.

    Args:
        module: The convolution; only its geometry is read.
        x: Inputs, padded, shape ``[S, T, C, *size]``.
        grad: Output gradients, shape ``[S, T, O, *out size]``.
    """

    def __init__(self, module: ConvNd, x: Tensor, grad: Tensor) -> None:
        self.module, self.x, self.grad = module, x, grad
        self.samples = x.shape[0]
        self.positions = prod(grad.shape[3:])
        self.tokens = x.shape[1] * self.positions
        self.rows = module.out_channels
        self.columns = module.in_channels // module.groups * prod(module.kernel_size)
        self.flops_per_element = 2.0 * self.tokens

    def _patches(self, start: int, stop: int) -> Tensor:
        """Return the patches of some samples, shape ``[s, T, groups, C/g·k, positions]``."""
        module, x = self.module, self.x[start:stop]
        size, strides = list(x.shape[3:]), list(x.stride())
        out = self.grad.shape[3:]
        window = x.as_strided(
            [*x.shape[:3], *module.kernel_size, *out],
            [
                *strides[:3],
                *(d * s for d, s in zip(module.dilation, strides[3:], strict=True)),
                *(step * s for step, s in zip(module.stride, strides[3:], strict=True)),
            ],
            x.storage_offset(),
        )
        assert len(size) == len(out)
        return window.reshape(*x.shape[:2], module.groups, self.columns, self.positions)

    def block(self, start: int, stop: int) -> Tensor:
        """Return rows ``[start, stop)``: filters, of all samples."""
        groups = self.module.groups
        per_group = self.rows // groups
        first, last = start // per_group, -(-stop // per_group)
        bytes_per_sample = self.tokens * groups * self.columns * self.x.element_size()
        step = max(1, _PATCH_BYTES // max(1, bytes_per_sample))
        parts = []
        for s in range(0, self.samples, step):
            patches = self._patches(s, s + step)[:, :, first:last]
            grad = self.grad[s : s + step].flatten(3)
            if groups == 1:
                rows, columns = grad[:, :, start:stop], patches[:, :, 0]
                parts.append(torch.einsum("stop,stdp->sod", rows, columns))
                continue
            grad = grad.unflatten(2, (groups, per_group))[:, :, first:last]
            whole = torch.einsum("stgop,stgdp->sgod", grad, patches).flatten(1, 2)
            parts.append(whole[:, start - first * per_group : stop - first * per_group])
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def transposed(self) -> Factor:
        """Return the factor of the transposed weight (columns are input channels × kernel)."""
        return Transposed(self)


class UngroupedConvolution(Convolution):
    """A convolution of one group, which is also a sum of outer products over positions."""

    def token_form(self) -> Outer:
        """Return patches and output gradients of all positions as tokens."""
        patches = self._patches(0, self.samples)[:, :, 0].transpose(2, 3)
        grad = self.grad.flatten(3).transpose(2, 3)
        return Outer(
            patches.reshape(self.samples, self.tokens, self.columns),
            grad.reshape(self.samples, self.tokens, self.rows),
        )


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
        # (left, right) per dimension from the last to the first, for "same" and numbers alike
        padding = conv._reversed_padding_repeated_twice
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        padded = F.pad(x.flatten(0, 1), padding, mode=mode).unflatten(0, x.shape[:2])
        kind = UngroupedConvolution if conv.groups == 1 else Convolution
        return {
            "weight": kind(conv, padded, grad),
            "bias": Dense(grad.flatten(3).sum((1, 3)).unsqueeze(-1)),
        }
