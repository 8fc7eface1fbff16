"""What autocast would do to the operands of a layer, for code that runs below it."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype that autocast computes products in on a device, None where it is off."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def lowered(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return ``tensor`` in autocast's dtype, under autocast's own rule: float64 stays as it is."""
    if dtype is None or tensor.dtype == torch.float64 or not tensor.is_floating_point():
        return tensor
    return tensor.to(dtype)
