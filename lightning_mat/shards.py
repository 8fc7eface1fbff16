"""Shards: parameters of which each rank holds some rows, as FSDP2's ``fully_shard`` leaves them.

Between steps a sharded parameter is a ``DTensor``: its shape is that of the whole parameter, its
memory some rows. In the forward pass FSDP puts a plain parameter with all rows in its place, the
*leaf* to which gradients arrive; then it sends each rank the mean of its rows' gradients.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_mat.units.unit import Rect


def is_sharded(tensor: object) -> bool:
    """Return whether a tensor is a ``DTensor``; imports nothing.

    Example:
        >>> is_sharded(torch.zeros(2)), is_sharded(None)
        (False, False)
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_of(tensor: Tensor) -> Tensor:
    """Return the rows that this rank holds, in the same memory; any other tensor as it is."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return cast(Tensor, cast(Any, tensor).to_local())


def local_rows(tensor: Tensor) -> tuple[int, int]:
    """Return which rows ``[start, stop)`` of a sharded tensor this rank holds; perhaps none."""
    mesh, rows = cast(Any, tensor).device_mesh, tensor.shape[0]
    size = -(-rows // mesh.size())  # as torch.chunk has it: the last ranks have fewer, or none
    start = min(size * mesh.get_local_rank(), rows)
    return start, min(start + size, rows)


def local_rects(tensor: Tensor, rects: Sequence[Rect]) -> list[Rect]:
    """Return what of some rectangles this rank holds, counted from its first row.

    Example:
        >>> local_rects(torch.zeros(4, 3), [Rect(0, 2, 0, 3)])
        [Rect(r0=0, r1=2, c0=0, c1=3)]
    """
    if not is_sharded(tensor):
        return list(rects)
    start, stop = local_rows(tensor)
    clipped = [Rect(max(r.r0, start) - start, min(r.r1, stop) - start, r.c0, r.c1) for r in rects]
    return [rect for rect in clipped if rect.r0 < rect.r1]


def sharded_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules on which ``fully_shard`` was called."""
    module = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(module, "FSDPModule", None)
    return [] if kind is None else [m for m in model.modules() if isinstance(m, kind)]


def reshard(model: nn.Module) -> None:
    """Let a model hold its sharded parameters, which a pass without gradients may have left out."""
    for module in sharded_modules(model):
        cast(Any, module).reshard()


def leaves_of(model: nn.Module) -> dict[Tensor, nn.Parameter]:
    """Return sharded parameter → what the model holds in its place while it runs.

    FSDP makes these once, and empties and fills their memory from then on. A collective: every
    sharded module is gathered, one after the other.
    """
    reshard(model)
    leaves: dict[Tensor, nn.Parameter] = {}
    for module in sharded_modules(model):
        held = [
            (child._parameters, name, param)
            for child in module.modules()
            for name, param in child._parameters.items()
            if is_sharded(param)
        ]
        cast(Any, module).unshard()
        try:
            for parameters, name, param in held:
                leaf = parameters[name]
                if param is not None and leaf is not None and leaf is not param:
                    leaves[param] = leaf
        finally:
            cast(Any, module).reshard()
    return leaves


def check_shards(model: nn.Module, processes: int) -> bool:
    """Return whether a model is sharded, and check that its units can be followed then.

    Args:
        model: The model.
        processes: How many train it together; 0 where that was not said.

    Raises:
        ValueError: If they cannot; the message says why, and what to use.
    """
    reshard(model)
    named = dict(model.named_parameters())
    if not any(map(is_sharded, named.values())):
        return False
    if not processes:
        raise ValueError(
            "the model is sharded: every process measures a share of its units, so pass "
            "ranks=lightning_mat.parallel.Ranks(device)"
        )
    for name, param in named.items():
        if is_sharded(param):
            _check_shard(name, param)
        elif param.requires_grad and processes > 1:
            raise ValueError(
                f"parameter {name!r} is in no module on which fully_shard was called, so that "
                "every process trains one of its own: call fully_shard on the model around it, too"
            )
    for name, module in model.named_modules():
        if module._compiled_call_impl is not None or hasattr(module, "_orig_mod"):
            raise ValueError(
                f"module {name!r} is compiled, which does not work together with units of sharded "
                'parameters: leave torch.compile out, or use strategy="ddp_mat"'
            )
    return True


def _check_shard(name: str, param: Tensor) -> None:
    mesh, placements = cast(Any, param).device_mesh, cast(Any, param).placements
    local = local_of(param)
    if len(placements) != 1 or not placements[0].is_shard(0):
        raise ValueError(
            f"parameter {name!r} is placed as {tuple(placements)}, but units are followed through "
            "runs of rows on one mesh dimension only: call fully_shard with a mesh of one dimension"
            " and without shard_placement_fn, and leave tensor parallelism out"
        )
    if local.device.type != mesh.device_type:
        raise ValueError(
            f"parameter {name!r} is kept on {local.device.type} for a mesh of "
            f"{mesh.device_type}: leave CPUOffloadPolicy out, because a probe needs the whole "
            "model on the device"
        )
    if type(local.detach()) is not Tensor:
        raise ValueError(
            f"parameter {name!r} holds a {type(local).__name__}, of which no rows can be stepped "
            "on their own: shard ordinary tensors"
        )
