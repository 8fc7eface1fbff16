"""GradientBuffer: the memory of a gradient of which a part is always zero, allocated once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class GradientBuffer:
    """Keeps a parameter-sized tensor of zeros between steps, so that only what trains is written.

    A fresh tensor of zeros in every step is memory that the system has to map and to clear. The one
    that was handed out in the step before is zero where the parameter rests, and everything else is
    overwritten; it is handed out again once nobody else holds it. Where somebody changed it in
    place (as clipping does), it is cleared first.

    Args:
        clear: Writes zeros to a tensor wherever the parameter rests.
        keep: Whether to keep it; of a sharded parameter it would be as large as all shards.

    Example:
        >>> buffer = GradientBuffer()
        >>> grad = buffer.zeros(torch.Size([2]), torch.float32, torch.device("cpu"))
        >>> address = grad.data_ptr()
        >>> buffer.zeros(grad.shape, grad.dtype, grad.device).data_ptr() == address
        False
        >>> del grad
        >>> grad = buffer.zeros(torch.Size([2]), torch.float32, torch.device("cpu"))
        >>> grad.data_ptr() == address
        True
    """

    def __init__(
        self, clear: Callable[[Tensor], object] = Tensor.zero_, *, keep: bool = True
    ) -> None:
        self._clear, self._keep = clear, keep
        self._kept: Tensor | None = None
        self._version = 0

    def zeros(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a tensor that is zero, or was when it was handed out last and nobody changed it.

        The caller writes all that trains and calls :meth:`written`.
        """
        if torch.compiler.is_compiling() or _fresh or not self._keep:
            return torch.zeros(shape, dtype=dtype, device=device)
        kept = self._kept
        if kept is None or (kept.shape, kept.dtype, kept.device) != (shape, dtype, device):
            kept = self._kept = torch.zeros(shape, dtype=dtype, device=device)
        elif _holders(kept) > 1:
            return torch.zeros(shape, dtype=dtype, device=device)
        elif kept._version != self._version:
            self._clear(kept)
        # Another object on the same memory: autograd takes it over as .grad without a copy.
        return kept.detach()

    def written(self, grad: Tensor) -> None:
        """Note that what trains has been written, and that changes from now on are somebody's."""
        kept = self._kept
        if torch.compiler.is_compiling() or kept is None:
            return
        if grad.data_ptr() == kept.data_ptr():
            self._version = kept._version


_fresh = False


@contextmanager
def fresh_buffers() -> Iterator[None]:
    """Keep no memory inside: for compiled code, which may write into whatever it is given."""
    global _fresh
    before, _fresh = _fresh, True
    try:
        yield
    finally:
        _fresh = before


def fresh() -> bool:
    """Return whether no memory is kept now."""
    return _fresh


def _holders(tensor: Tensor) -> int:
    """Return how many tensors share the memory of one; its own Python object counts as one."""
    storage = tensor.untyped_storage()
    return int(torch._C._storage_Use_Count(storage._cdata)) - 1
