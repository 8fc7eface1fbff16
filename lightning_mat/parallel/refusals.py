"""What a run in several processes may be made of; what cannot work is refused at its start."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
)
from lightning.pytorch.strategies.xla import XLAStrategy
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState

_INSTEAD = 'use strategy="ddp_mat", or strategy="ddp"'
_REFUSED: tuple[tuple[type[Strategy], str], ...] = (
    (
        FSDPStrategy,
        "it flattens the parameters of a module into one, of which units own slices; "
        "ModelParallelStrategy with fully_shard on each block shards them one by one",
    ),
    (
        DeepSpeedStrategy,
        "DeepSpeed takes gradients and optimizer into its own hands, where no part of a parameter "
        "can rest",
    ),
    (XLAStrategy, "XLA traces the step once, with everything that trains then"),
)


def check_strategy(trainer: pl.Trainer) -> None:
    """Check that decisions can be followed under a run's strategy.

    Raises:
        ValueError: If they cannot; the message says why, and what to use.
    """
    strategy = trainer.strategy
    for kind, reason in _REFUSED:
        if isinstance(strategy, kind):
            raise ValueError(
                f"MATCallback does not work with {kind.__name__}: {reason}. {_INSTEAD}"
            )
    if isinstance(strategy, DDPStrategy):
        check_static_graph(strategy)
        group = strategy._ddp_kwargs.get("process_group")
        if group is not None and dist.get_world_size(group) != trainer.world_size:
            raise ValueError(
                f"process_group has {dist.get_world_size(group)} of {trainer.world_size} processes:"
                " every group would train a model of its own, and none is measured for all. Leave "
                "process_group out, or give a group of all processes"
            )
        if isinstance(strategy._ddp_comm_state, PostLocalSGDState):
            raise ValueError(
                "MATCallback does not work with post-local SGD: between two averagings every "
                f"process trains a model of its own, and none is measured for all. {_INSTEAD}"
            )
    elif isinstance(strategy, ModelParallelStrategy):
        if strategy.device_mesh["tensor_parallel"].size() > 1:
            raise ValueError(
                "MATCallback does not work with tensor parallelism, where no process has all rows "
                "of a parameter in its forward pass: use ModelParallelStrategy("
                f"data_parallel_size={trainer.world_size}, tensor_parallel_size=1) with "
                'fully_shard on each block, or strategy="ddp_mat"'
            )
    elif trainer.world_size > 1:
        raise ValueError(
            f"MATCallback runs in several processes with DDP and FSDP2 only, this run has "
            f"{trainer.world_size} with {type(strategy).__name__}: {_INSTEAD}"
        )
    for name, module in trainer.lightning_module.named_modules():
        if isinstance(module, nn.DataParallel):
            raise ValueError(
                f"module {name!r} is an nn.DataParallel, which runs copies of the model in which "
                f"nothing rests: take the module inside of it, and {_INSTEAD}"
            )


def check_static_graph(strategy: Any) -> None:
    """Raise a ValueError if DDP is to take the graph of the first step for that of all."""
    if strategy._ddp_kwargs.get("static_graph"):
        raise ValueError(
            "static_graph=True lets DDP take the first step's graph for that of all steps, but "
            "every decision changes which parameters are in it: leave static_graph out. Resting "
            "parameters are made known to DDP without find_unused_parameters"
        )
