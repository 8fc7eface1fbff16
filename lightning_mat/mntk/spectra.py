"""Spectra: the eigenvalues of every unit's mNTK, and the scalars that summarise them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spectra:
    r"""Eigenvalues of the modular neural tangent kernels of L units over S samples.

    The mNTK of unit l is :math:`\Theta^l = J_l J_l^\top`, with :math:`J_l` of shape [S, parameters
    of l] the Jacobian of one scalar per sample.

    Args:
        names: Names of the units, length L.
        eigenvalues: float64, shape ``[L, S]``, descending, on the CPU; NaN where a unit's
            gradients held NaN or Inf.
        cost: FLOPs per sample that computing each unit's weight gradient adds to a training step,
            float64, shape ``[L]``.
        gram: The mNTKs, shape ``[L, S, S]``, where they were asked for.
        alignment: :math:`(u_1^\top r)^2`, float64, shape ``[L]``, where it was asked for: how far
            the principal eigenvector points along the loss gradient r at the outputs; see
            :mod:`lightning_mat.mntk.alignment`.

    Source:
        Shi et al., "Train Faster, Perform Better: Modular Adaptive Training in Over-Parameterized
        Models" (NeurIPS 2023), definition 1; equation 3 for the alignment.

    Example:
        >>> s = Spectra(("a",), torch.tensor([[8.0, 2.0, 0.0]], dtype=torch.float64),
        ...             torch.zeros(1))
        >>> s.lambda_max.item(), s.trace.item(), s.condition_number.item()
        (8.0, 10.0, inf)
    """

    names: tuple[str, ...]
    eigenvalues: Tensor
    cost: Tensor
    gram: Tensor | None = None
    alignment: Tensor | None = None

    @property
    def lambda_max(self) -> Tensor:
        """Principal eigenvalues, shape ``[L]``."""
        return self.eigenvalues[:, 0]

    @property
    def lambda_min(self) -> Tensor:
        """Smallest eigenvalues, at least 0, shape ``[L]``."""
        return self.eigenvalues[:, -1].clamp_min(0)

    @property
    def trace(self) -> Tensor:
        """Sums of the eigenvalues, shape ``[L]``."""
        return self.eigenvalues.sum(-1)

    @property
    def condition_number(self) -> Tensor:
        """λ_max / λ_min, shape ``[L]``.

        Inf where λ_min is zero up to rounding, that is below ``S · 2⁻⁵² · λ_max``: what is left
        there of a rank-deficient Gram is noise, and a ratio to it would mean nothing.
        """
        floor = self.eigenvalues.shape[-1] * torch.finfo(torch.float64).eps * self.lambda_max
        ratio = self.lambda_max / self.lambda_min
        singular = (self.lambda_min <= floor) & self.lambda_max.isfinite()
        return torch.where(singular, torch.full_like(ratio, torch.inf), ratio)

    @property
    def effective_rank(self) -> Tensor:
        """Exponential of the entropy of the normalised spectrum, in [1, S], shape ``[L]``.

        0 where all eigenvalues are 0.

        Source:
            Roy & Vetterli, "The effective rank" (EUSIPCO 2007).
        """
        values = self.eigenvalues.clamp_min(0)
        total = values.sum(-1, keepdim=True)
        share = values / torch.where(total > 0, total, 1.0)
        rank = (-torch.xlogy(share, share).sum(-1)).exp()
        return torch.where(total.squeeze(-1) > 0, rank, values.sum(-1))

    @property
    def finite(self) -> Tensor:
        """Whether what was measured of a unit is free of NaN and Inf, bool, shape ``[L]``."""
        finite = self.eigenvalues.isfinite().all(-1)
        return finite if self.alignment is None else finite & self.alignment.isfinite()
