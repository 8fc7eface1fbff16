"""What the callback asks of a Lightning run: can it work with it, its folder, its loggers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakSet

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_mat.mntk.quiet import kept_random_streams
from lightning_mat.mntk.samples import shapes_of
from lightning_mat.parallel.batches import same_batch
from lightning_mat.parallel.ranks import Ranks, together
from lightning_mat.parallel.refusals import check_strategy
from lightning_mat.sampling import check_loader, draw, seed_of

Function = Callable[[Any, Any], Any]

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
    a logger, runs would pile up in one folder that nobody asked for; ``fast_dev_run`` leaves none.
    """
    if not trainer.loggers or isinstance(trainer.loggers[0], DummyLogger):
        return None
    folder, logger = Path(trainer.log_dir or trainer.default_root_dir), trainer.loggers[0]
    if isinstance(logger, (TensorBoardLogger, CSVLogger)):
        return folder
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return folder / str(logger.name) / version


def samples_of(batch: Any) -> int:
    """Return the samples of a training batch, at least 1.

    Where its tensors disagree, the fewest: a probe must not take more at a time than a step.
    """
    return max(1, min((shape[0] for shape in shapes_of(batch)), default=1))


def probe_batch(
    trainer: pl.Trainer, data: object, n_samples: int, seed: int, number: int, ranks: Ranks | None
) -> Any:
    """Return samples for a probe, on the device, as a training step would get them.

    The hooks of the module and its data may augment them at random: the random number streams, on
    the device too, are seeded before them and as before afterwards.

    Args:
        trainer: The run's.
        data: The loader to draw from.
        n_samples: S.
        seed: Of the run.
        number: Of the probe, from 0.
        ranks: The processes that probe together.
    """
    with together(ranks, "drawing samples"):
        batch = draw(check_loader(data, n_samples), n_samples, seed, number)
    if ranks is not None:
        batch = same_batch(batch, ranks)
    device = trainer.strategy.root_device
    streams = kept_random_streams([device] if device.type == "cuda" else [], seed_of(seed, number))
    with together(ranks, "bringing samples to the device"), streams:
        batch = trainer.precision_plugin.convert_input(batch)
        batch = trainer.lightning_module._on_before_batch_transfer(batch)
        return trainer.strategy.batch_to_device(batch)


def in_default_dtype(trainer: pl.Trainer, function: Function) -> Function:
    """Return a function that runs as a training step does with ``precision="64-true"`` and alike.

    There Lightning sets the type of tensors that a model makes without saying one. Autocast is the
    probe's own matter, and every other precision leaves the function as it is.

    Args:
        trainer: The run's.
        function: ``(module, batch) -> tensor``.
    """
    plugin = trainer.precision_plugin
    if not isinstance(plugin, (DoublePrecision, HalfPrecision)):
        return function

    def run(module: Any, batch: Any) -> Any:
        with plugin.forward_context():
            return function(module, batch)

    return run


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
