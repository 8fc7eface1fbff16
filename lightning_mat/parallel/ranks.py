"""Ranks: what the processes of a run say to each other about probes and decisions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_mat.faults import PeerError, PeerMemoryError, PeerMistakeError, severity
from lightning_mat.mntk.memory import ProbeMemoryError, is_out_of_memory

BUFFERS = "the model's buffers do not fit the memory a second time, as a probe needs them"


class Ranks:
    """The processes that train one model together, each with a copy of it.

    Every method is a collective: all ranks call it, in the same order.

    Args:
        device: Where tensors have to live that travel: the rank's GPU for NCCL, else the CPU.
        group: The process group; the default one if None.

    Attributes:
        rank: This process's number in the group.
        size: How many processes there are.

    Raises:
        RuntimeError: If ``torch.distributed`` is not initialized.
    """

    def __init__(self, device: torch.device, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_initialized():
            raise RuntimeError(
                "torch.distributed is not initialized: call torch.distributed.init_process_group "
                "before several processes train together"
            )
        self.group = cast(dist.ProcessGroup, dist.group.WORLD if group is None else group)
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.device = device if dist.get_backend(self.group) == "nccl" else torch.device("cpu")
        self._first = dist.get_global_rank(self.group, 0)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over the ranks, on the CPU; bits that one rank alone gives stay."""
        total = tensor.to(self.device, copy=True)
        dist.all_reduce(total, group=self.group)
        return total.cpu()

    def from_first(self, thing: Any) -> Any:
        """Return rank 0's object: tensors and plain types."""
        box = [thing]
        dist.broadcast_object_list(box, src=self._first, group=self.group)
        return box[0]

    def of_all(self, thing: Any) -> list[Any]:
        """Return every rank's object, rank 0's first."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, thing, group=self.group)
        return found

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Let a block succeed on all ranks, or raise on all of them.

        Without that, a rank on which a probe fails would leave the others waiting for its numbers
        until the process group's timeout. An exit or an interrupt is not passed on: those reach
        every process by themselves.

        Args:
            what: What the block does, for the message.

        Raises:
            PeerError: On the ranks where the block succeeded, if it failed on another; the message
                names that rank and repeats its error. A run survives it where that rank survives
                its own, see :mod:`lightning_mat.faults`.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        if not self.sum(torch.tensor([failure is not None], dtype=torch.int64)):
            return
        said = (
            None if failure is None else (severity(failure), f"{type(failure).__name__}: {failure}")
        )
        errors = self.of_all(said)
        worst = max(error[0] for error in errors if error is not None)
        # All raise what a run survives, or all what it does not.
        if failure is not None and severity(failure) == worst:
            raise failure
        rank = next(i for i, error in enumerate(errors) if error is not None and error[0] == worst)
        text = f"{what} failed in process {rank} of {self.size}: {errors[rank][1]}"
        raise {0: PeerMemoryError, 1: PeerError, 2: PeerMistakeError}[worst](text)

    def check_same(self, what: str, value: str) -> None:
        """Check that every rank holds the same.

        Args:
            what: What it is, for the message.
            value: A digest of it.

        Raises:
            RuntimeError: On all ranks, if one has another value than rank 0; it is named.
        """
        values = self.of_all(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise RuntimeError(
                    f"{what} of process {rank} is another than that of process 0 ({other} and "
                    f"{values[0]}): start every process with the same code and the same checkpoint"
                )

    @contextmanager
    def same_buffers(self, model: nn.Module) -> Iterator[None]:
        """Lend every rank the buffers of rank 0's model, and give its own back on exit.

        BatchNorm's running statistics differ between the ranks after a step; DDP sends rank 0's
        with the next forward pass. Every unit should be measured in the same model.

        Raises:
            ProbeMemoryError: On all ranks, if they do not fit the memory of one twice.
        """
        buffers = [b.detach() for b in model.buffers() if b.numel()]
        if not buffers:
            yield
            return
        with self.together("copying the model's buffers"), fitting(BUFFERS):
            kept = [buffer.clone() for buffer in buffers]
            # The buffer itself where it can travel as it is.
            travelling = [buffer.to(self.device).contiguous() for buffer in buffers]
        try:
            with torch.no_grad():
                for buffer, sent in zip(buffers, travelling, strict=True):
                    dist.broadcast(sent, src=self._first, group=self.group)
                    if self.rank:
                        buffer.copy_(sent)
            yield
        finally:
            if self.rank:
                with torch.no_grad():
                    for buffer, before in zip(buffers, kept, strict=True):
                        buffer.copy_(before)


def together(ranks: Ranks | None, what: str) -> AbstractContextManager[None]:
    """Return :meth:`Ranks.together`, or for one process a block like any other."""
    return nullcontext() if ranks is None else ranks.together(what)


@contextmanager
def fitting(what: str) -> Iterator[None]:
    """Let a block raise a ProbeMemoryError with this message where memory runs out in it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise ProbeMemoryError(what) from error
        raise
