"""The bytes that a forward pass keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode


class Saved(NamedTuple):
    """Bytes of the storages that autograd saves.

    Attributes:
        activations: Of what depends on the batch.
        weights: Of copies of parameters: in the precision of autocast, or of slices.
    """

    activations: int
    weights: int


def saved_bytes(forward: Callable[[], object], parameters: Iterable[Tensor]) -> Saved:
    """Return the bytes of the storages that autograd saves while ``forward`` runs, each once.

    Parameters themselves are not counted. A slice of an activation that is saved as a view keeps,
    and counts, all of it.

    Args:
        forward: Makes the loss; not compiled.
        parameters: The model's.

    Example:
        >>> layer, x = torch.nn.Linear(3, 5), torch.ones(7, 3)
        >>> saved_bytes(lambda: layer(x).square().sum(), layer.parameters())  # inputs and outputs
        Saved(activations=224, weights=0)
    """
    # Tensors are kept, so that no storage's address is used twice.
    own = {_storage(p): p for p in parameters}
    copies = _Copies(own)
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[_storage(tensor)] = tensor
        return tensor

    with copies, saved_tensors_hooks(pack, lambda tensor: tensor):
        keep = forward()
    activations = weights = 0
    for storage, tensor in saved.items():
        if storage in copies.found:
            weights += tensor.untyped_storage().nbytes()
        elif storage not in own:
            activations += tensor.untyped_storage().nbytes()
    del keep
    return Saved(activations, weights)


class _Copies(TorchDispatchMode):
    """Finds the storages of copies of parameters, of parts of them, and of copies of those."""

    operations = frozenset(
        {
            torch.ops.aten._to_copy.default,
            torch.ops.aten.clone.default,
            torch.ops.aten.index_select.default,
            torch.ops.aten.index.Tensor,
            torch.ops.aten.cat.default,
        }
    )

    def __init__(self, own: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.own = own
        self.found: dict[int, Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in self.operations:
            sources = args[0] if isinstance(args[0], (list, tuple)) else args[:1]
            if all(_storage(t) in self.own or _storage(t) in self.found for t in sources):
                self.found[_storage(out)] = out
        return out


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
