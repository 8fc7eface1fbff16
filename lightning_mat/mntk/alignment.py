r"""Alignment: how far an mNTK's principal eigenvector points along the loss gradient.

Equation 3 of the MAT paper reads a step's loss reduction as
:math:`\sum_l \lambda_{\max}^l (u_1^{l\top} r)^2`, with r the gradient of the loss with respect to
the outputs. Where the output of a sample is its loss, the total loss is the sum of the outputs, and
r is a vector of ones. For other outputs the two do not meet in one number per sample: the softmax
cross-entropy does not see a constant added to all logits of a sample, so that its gradient along
their sum is zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mat.mntk.outputs import Output

# Matrices are solved in float64 this many bytes at a time.
_SLICE_BYTES = 32 << 20


def check_alignment(output: Output) -> None:
    """Raise a ValueError if the alignment does not exist for an output.

    Args:
        output: The scalar per sample, see :mod:`lightning_mat.mntk.outputs`.
    """
    if output != "loss":
        raise ValueError(
            f'the alignment with the loss gradient, which criterion="trainability" needs, exists '
            f'for output="loss" only, got {output!r}: the loss does not depend on each sample '
            'through that scalar alone. Pass output="loss", or another criterion'
        )


def loss_alignment(grams: Tensor) -> Tensor:
    r"""Return :math:`(u_1^\top r)^2` of every unit, with r a vector of S ones.

    Solved in float64 on the CPU, slice by slice. The direction is as well defined as λ_max stands
    out from the second eigenvalue.

    Args:
        grams: The mNTKs with ``output="loss"``, shape ``[L, S, S]``.

    Returns:
        float64, shape ``[L]``, in [0, S]; 0 where the mNTK is zero and has no direction, NaN where
        it holds NaN or Inf.

    Source:
        Shi et al., MAT (NeurIPS 2023), equation 3.

    Example:
        >>> loss_alignment(torch.tensor([[[2.0, 2.0], [2.0, 2.0]], [[3.0, 0.0], [0.0, 1.0]]]))
        tensor([2.0000, 1.0000], dtype=torch.float64)
    """
    units, samples = grams.shape[:2]
    found = torch.full((units,), torch.nan, dtype=torch.float64)
    count = max(1, _SLICE_BYTES // (8 * samples**2))
    for start in range(0, units, count):
        part = grams[start : start + count].detach().cpu().double()
        finite = part.isfinite().flatten(1).all(1)
        vectors = torch.linalg.eigh(part[finite]).eigenvectors[..., -1]
        zero = (part[finite] == 0).flatten(1).all(1)
        aligned = vectors.sum(-1).square().masked_fill(zero, 0.0)
        found[start : start + count][finite] = aligned
    return found
