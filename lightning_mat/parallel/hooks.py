"""DDP's communication hook: of every bucket only what trains is sent.

A bucket's gradients are zero wherever something rests, on every rank, so that their mean is known
without sending it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.futures import Future

from lightning_mat.gate.plan import everything
from lightning_mat.parallel.compact import Compact
from lightning_mat.units.regions import Block

if TYPE_CHECKING:
    from lightning_mat.engine import MAT

Hook = Callable[[Any, Any], Future[Tensor]]

# Decisions whose tables are kept: policies that alternate come back to them.
DECISIONS = 4

# What travels is of this type; None for that of the gradients.
_TYPE: dict[Any, torch.dtype | None] = {
    default_hooks.allreduce_hook: None,
    default_hooks.fp16_compress_hook: torch.float16,
    default_hooks.bf16_compress_hook: torch.bfloat16,
}
_WRAPPED: dict[Any, torch.dtype] = {
    default_hooks.fp16_compress_wrapper: torch.float16,
    default_hooks.bf16_compress_wrapper: torch.bfloat16,
}


class CompactBucket:
    """What the compression hooks see of a bucket: its buffer."""

    def __init__(self, buffer: Tensor) -> None:
        self._buffer = buffer

    def buffer(self) -> Tensor:
        """Return the tensor to reduce."""
        return self._buffer

    def set_buffer(self, buffer: Tensor) -> None:
        """Reduce another tensor."""
        self._buffer = buffer


class Reduction:
    """Averages over the ranks what trains of each bucket.

    Args:
        hook: ``allreduce_hook``, ``fp16_compress_hook`` or ``bf16_compress_hook`` of
            ``torch.distributed.algorithms.ddp_comm_hooks.default_hooks``; the first if None.
        wrapper: ``fp16_compress_wrapper`` or ``bf16_compress_wrapper``, or None.
        group: The process group, the default one if None.

    Attributes:
        bytes_reduced: Bytes that this rank gave to all-reduces in the newest backward pass that
            synchronised.

    Raises:
        ValueError: If the hook or the wrapper is another.
    """

    def __init__(
        self,
        hook: Hook | None = None,
        wrapper: Callable[[Hook], Hook] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        hook = cast(Hook, default_hooks.allreduce_hook) if hook is None else hook
        _check(hook, "ddp_comm_hook", _TYPE)
        self._dtype = _TYPE[hook]
        if wrapper is not None:
            _check(wrapper, "ddp_comm_wrapper", _WRAPPED)
            # What the wrapper casts to comes first, what the hook casts to is sent.
            self._dtype = self._dtype or _WRAPPED[wrapper]
        self._hook, self._wrapper = hook, wrapper
        self.group = group
        self.bytes_reduced = 0
        self._mat: MAT | None = None
        self._names: dict[int, str] = {}
        self._tables: OrderedDict[bytes, dict[tuple[int, ...], Compact]] = OrderedDict()

    def follow(self, mat: MAT | None) -> None:
        """Leave out what rests by an engine's decisions; None to send everything again."""
        self._mat = mat
        self._tables.clear()
        named = () if mat is None else mat.model.named_parameters()
        self._names = {id(param): name for name, param in named}

    def __call__(self, bucket: Any) -> Future[Tensor]:
        """Start to reduce a bucket; the future gives its buffer with what trains averaged."""
        if bucket.index() == 0:
            self.bytes_reduced = 0
        buffer = bucket.buffer()
        if buffer.is_sparse:
            return self._send(buffer)
        compact = self._table(bucket.parameters())
        if compact.numel == 0:
            done: Future[Tensor] = Future()
            done.set_result(buffer)
            return done

        def write(future: Future[Tensor]) -> Tensor:
            compact.scatter(future.value(), buffer)
            return cast(Tensor, buffer)

        return self._send(compact.gather(buffer)).then(write)

    def _send(self, flat: Tensor) -> Future[Tensor]:
        size = (self._dtype or flat.dtype).itemsize
        self.bytes_reduced += (flat._nnz() if flat.is_sparse else flat.numel()) * size
        # Wrapped here: what a wrapper returns cannot be sent to processes that are spawned.
        hook = self._hook if self._wrapper is None else self._wrapper(self._hook)
        return hook(self.group, CompactBucket(flat))

    def _table(self, params: Sequence[Tensor]) -> Compact:
        """Return what of a bucket trains.

        DDP makes new buckets after its first step: they are told by what is in them.
        """
        decision = b"" if self._mat is None else self._mat.active.numpy().tobytes()
        if decision not in self._tables:
            self._tables[decision] = {}
            if len(self._tables) > DECISIONS:
                self._tables.popitem(last=False)
        self._tables.move_to_end(decision)
        tables = self._tables[decision]
        key = tuple(map(id, params))
        if key not in tables:
            tables[key] = Compact(params, [self._blocks(param) for param in params])
        return tables[key]

    def _blocks(self, param: Tensor) -> tuple[Block, ...]:
        """Return what of a parameter trains: all of it, unless units own it."""
        mat, name = self._mat, self._names.get(id(param))
        if mat is None or name not in mat.part.owners:
            return (everything(param),)
        return mat.part.active_blocks(name, mat.active)


def reduce_bucket(state, bucket):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Reduce a bucket; the hook that DDP gets, without the annotations that it would check."""
    return cast(Reduction, state)(bucket)


def _check(hook: Any, name: str, known: dict[Any, Any]) -> None:
    if hook in known:
        return
    allowed = ", ".join(h.__name__ for h in known)
    raise ValueError(
        f"{name} is {getattr(hook, '__name__', hook)!r}, but ddp_mat sends another number of "
        f"elements after every decision, which is known to work with {allowed} only: use one of "
        'these, or strategy="ddp", which sends everything through any hook'
    )
