"""What a pass holds in memory, and how running out of it shows."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class ProbeMemoryError(RuntimeError):
    """Not even a probe of one sample at a time fits the memory."""


def free_memory(device: torch.device) -> None:
    """Give back what a failed attempt left; call it where its exception is no longer held.

    Exceptions hold the frames that they passed through, and these the tensors.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on a GPU or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "not enough memory" in text or "out of memory" in text
    )


@contextmanager
def memory_errors(text: str) -> Iterator[None]:
    """Raise a :class:`ProbeMemoryError` with a text where memory runs out; all else passes.

    It is a decorator, too. Errors of the system's and the GPU's allocators do not say that a run
    survives them; this one does, see :mod:`lightning_mat.faults`.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ProbeMemoryError(text) from error


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that a forward pass saves for the backward pass, parameters left out."""

    def __init__(self, model: nn.Module) -> None:
        self.seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.total = 0
        super().__init__(self._pack, lambda tensor: tensor)

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count more tensors that a step keeps; those that share memory count once."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.seen:
                self.seen.add(storage.data_ptr())
                self.total += storage.nbytes()

    def _pack(self, tensor: Tensor) -> Tensor:
        self.add([tensor])
        return tensor
