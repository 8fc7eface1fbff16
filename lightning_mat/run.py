"""What the callback asks of a Lightning run: can it work with it, its folder, its loggers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakSet

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_mat.mntk.samples import count_samples
from lightning_mat.parallel.ranks import Ranks
from lightning_mat.parallel.refusals import check_strategy

_failed: WeakSet[Logger] = WeakSet()
"""Loggers of which a warning has said that they cannot write."""


def check_run(trainer: pl.Trainer, callback: type[Callback]) -> None:
    """Check that a run can be trained with one callback that decides who trains.

    Args:
        trainer: The run's.
        callback: The class of which there must be one.

    Raises:
        ValueError: If the trainer has several, or its strategy cannot follow a decision.
    """
    found = [c for c in trainer.callbacks if isinstance(c, callback)]  # type: ignore[attr-defined]
    if len(found) > 1:
        raise ValueError(
            f"the trainer has {len(found)} {callback.__name__}s, but only one can decide which "
            "units train: keep one"
        )
    check_strategy(trainer)


def ranks_of(trainer: pl.Trainer) -> Ranks | None:
    """Return the processes of a run; None for one process that has the whole model."""
    several = trainer.world_size > 1 or isinstance(trainer.strategy, ModelParallelStrategy)
    return Ranks(trainer.strategy.root_device) if several else None


def run_folder(trainer: pl.Trainer) -> Path | None:
    """Return the folder of a run, where its probes are kept; None for a run without a logger.

    It is the first logger's folder: its ``log_dir``, or, like Lightning's checkpoints, ``name`` and
    ``version`` below its ``save_dir`` where it has no folder of its own (Weights & Biases). Without
    a logger, runs would pile up in one folder that nobody asked for.
    """
    if not trainer.loggers:
        return None
    folder, logger = Path(trainer.log_dir or trainer.default_root_dir), trainer.loggers[0]
    if isinstance(logger, (TensorBoardLogger, CSVLogger)):
        return folder
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return folder / str(logger.name) / version


def samples_of(batch: Any) -> int:
    """Return the samples of a training batch, 1 where they cannot be told."""
    try:
        return max(count_samples(batch), 1)
    except ValueError:
        return 1


def log_metrics(trainer: pl.Trainer, metrics: Mapping[str, float], step: int) -> None:
    """Log metrics, with ``mat/`` before their names, to all loggers of a run.

    A logger that cannot write (a full disk, a server that cannot be reached) costs one warning. It
    is asked again: a ``CSVLogger`` then writes what it has kept. What Lightning itself logs is
    Lightning's, and so are the errors.
    """
    named = {f"mat/{name}": value for name, value in metrics.items()}
    for logger in trainer.loggers:
        try:
            logger.log_metrics(named, step=step)
        except OSError as error:
            if logger not in _failed:
                _failed.add(logger)
                warnings.warn(
                    f"{type(logger).__name__} cannot log what MAT measures ({error}): training "
                    "goes on",
                    stacklevel=2,
                )
