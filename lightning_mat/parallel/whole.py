"""Whole: a sharded model as an ordinary one, for the length of a probe."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_mat.parallel.ranks import Ranks, fitting
from lightning_mat.shards import is_sharded, local_of, reshard, sharded_modules

TOO_LARGE = (
    "the whole model does not fit the memory beside its shard, but a probe of a sharded model "
    "needs it on every rank: use a policy that needs no spectra, or GPUs with more memory"
)


class Whole:
    """Stand-ins for the sharded parameters of a model, with memory only while they are in use.

    FSDP's own passes gather and free each block's parameters, on all ranks at once. In a probe
    each rank measures other units in another number of passes, so that there every rank has all
    parameters, in the type in which they are kept (not that of ``MixedPrecisionPolicy``), and
    FSDP's hooks are off.

    Args:
        model: The model, sharded by ``fully_shard``, or not.
        ranks: The processes.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self._model, self._ranks = model, ranks
        self._stand_ins: dict[Tensor, nn.Parameter] = {}
        reshard(model)
        for param in model.parameters():
            if is_sharded(param):
                device = local_of(param).device
                full = torch.empty(param.shape, dtype=param.dtype, device=device)
                self._stand_ins[param] = nn.Parameter(full, requires_grad=param.requires_grad)
                full.untyped_storage().resize_(0)

    @contextmanager
    def there(self) -> Iterator[None]:
        """Let the model be whole; a collective on entry. It is as it was on exit.

        Raises:
            ProbeMemoryError: On all ranks, if it does not fit the memory of one.
        """
        if not self._stand_ins:
            yield
            return
        with ExitStack() as stack:
            stack.callback(self._free)
            reshard(self._model)
            # Memory comes first: a rank that lacks some while the others gather would hang them.
            with self._ranks.together("making room for the whole model"), fitting(TOO_LARGE):
                room = self._allocate()
            self._gather(*room)
            del room
            for module in sharded_modules(self._model):
                stack.enter_context(_without_hooks(module))
            stack.enter_context(self._exchanged())
            yield

    def _allocate(self) -> tuple[Tensor, Tensor]:
        """Return room for the largest parameter's rows, as bytes: of one rank, and of all."""
        own = everyone = 0
        for param, full in self._stand_ins.items():
            full.untyped_storage().resize_(full.numel() * full.element_size())
            full.requires_grad_(param.requires_grad)
            size, ranks = _bytes_per_rank(param), cast(Any, param).device_mesh.size()
            own, everyone = max(own, size), max(everyone, size * ranks)
        device = full.device
        own_rows, all_rows = (
            torch.empty(size, dtype=torch.uint8, device=device) for size in (own, everyone)
        )
        return own_rows, all_rows

    @torch.no_grad()
    def _gather(self, own: Tensor, everyone: Tensor) -> None:
        """Fill the stand-ins, one by one, without asking for memory."""
        for param, full in self._stand_ins.items():
            mesh, local = cast(Any, param).device_mesh, local_of(param)
            size = _bytes_per_rank(param)
            own[: local.nbytes].view(local.dtype).view(local.shape).copy_(local)
            rows = everyone[: size * mesh.size()]
            dist.all_gather_into_tensor(rows, own[:size], group=mesh.get_group())
            # The last ranks may have fewer rows than the others: what they lack is at the end.
            full.copy_(rows[: full.nbytes].view(full.dtype).view(full.shape))

    def _free(self) -> None:
        for full in self._stand_ins.values():
            full.grad = None
            full.untyped_storage().resize_(0)

    @contextmanager
    def _exchanged(self) -> Iterator[None]:
        places = [
            (module._parameters, name, param)
            for module in self._model.modules()
            for name, param in module._parameters.items()
            if param is not None and param in self._stand_ins
        ]
        try:
            for parameters, name, param in places:
                parameters[name] = self._stand_ins[param]
            yield
        finally:
            for parameters, name, param in places:
                parameters[name] = param


def _bytes_per_rank(param: Tensor) -> int:
    """Return the bytes of the rows that a rank holds of a sharded parameter, the first the most."""
    rows, ranks = param.shape[0], int(cast(Any, param).device_mesh.size())
    return -(-rows // ranks) * (param.numel() // max(rows, 1)) * param.element_size()


@contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """Take FSDP's forward hooks off a module, and put them back where they were."""
    kept: list[tuple[OrderedDict[int, Any], OrderedDict[int, Any]]] = []
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        before = OrderedDict(cast("OrderedDict[int, Any]", hooks))
        own = [number for number, hook in before.items() if _is_of_fsdp(hook)]
        if not own:
            raise RuntimeError(
                f"this version of torch ({torch.__version__}) gathers the parameters of "
                f"{type(module).__name__} in another way than by forward hooks, so that it cannot "
                "be probed: use a policy that needs no spectra"
            )
        for number in own:
            del hooks[number]
        kept.append((cast("OrderedDict[int, Any]", hooks), before))
    try:
        yield
    finally:
        for hooks, before in kept:
            later = {number: hook for number, hook in hooks.items() if number not in before}
            hooks.clear()
            hooks.update(before)
            hooks.update(later)


def _is_of_fsdp(hook: Any) -> bool:
    origin = getattr(inspect.unwrap(hook), "__module__", "") or ""
    return origin.startswith("torch.distributed.fsdp.")
