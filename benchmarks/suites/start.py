"""Head start: plain training that all runs of a task begin after.

A text model first learns how frequent the words are, and leaves that plateau in a sudden descent.
When it does depends on chance more than on any method, so that in short runs a comparison would
measure the moment of the descent. Where a task has a head start, so many plain steps are trained
once, with a seed of their own, and kept in the cache folder; every method and seed begins there,
and their cost counts for none.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import lightning as L
import torch

from benchmarks.suites.build import built
from benchmarks.suites.spec import Task
from examples.data.cache import cache_folder, publish
from lightning_mat.mntk.quiet import kept_random_streams

SEED = 1000
#: How the head start trains, whatever the runs after it do.
RECIPE = {"optimizer": "adamw", "lr": 1e-3}
#: Its learning rate is that of the beginning of a run so many times as long: a start that had been
#: cooled down would leave little to learn in a short run.
OF_A_LONGER_RUN = 3


def made(
    task: Task, steps: int, seed: int, data: Path | None, cache: Path | None = None
) -> tuple[L.LightningModule, L.LightningDataModule]:
    """Return the module after its head start, and its data; see :func:`build.built`.

    Args:
        task: What is trained.
        steps: Optimizer steps that the learning-rate schedule is for.
        seed: Of the data order, masks and dropout.
        data: Folder of the data sets.
        cache: Folder where head starts are kept, see :func:`examples.data.cache.cache_folder`.
    """
    if not task.head_start:
        return built(task, steps, seed, data)
    folder = cache_folder(cache) / "starts" / key(task)
    if not folder.is_dir():
        with kept_random_streams(seed=SEED):
            publish(folder, lambda to: _train(task, data, to / "state.pt"))
    module, text = built(task, steps, seed, data)
    module.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    return module, text


def key(task: Task) -> str:
    """Return a name of everything that a head start depends on, the optimizer after it not.

    Example:
        >>> task = Task("t", "bert", {"lr": 1.0}, {}, 6, 2, "heads", 1, 1, 2, head_start=3)
        >>> key(task) == key(replace(task, size={"lr": 0.1}, steps=7))
        True
        >>> key(task) == key(replace(task, head_start=4))
        False
    """
    size = {**task.size, **RECIPE}
    steps = [task.head_start, OF_A_LONGER_RUN]
    settings = [task.model, size, task.data, task.batch_size, steps, SEED]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    return f"{task.model}-{task.head_start}-{digest}"


def _train(task: Task, data: Path | None, path: Path) -> None:
    start = replace(task, size={**task.size, **RECIPE})
    print(
        f"  {task.model} {task.name}: {task.head_start} plain steps before all runs, once",
        flush=True,
    )
    module, text = built(start, OF_A_LONGER_RUN * task.head_start, SEED, data)
    trainer = L.Trainer(
        max_steps=task.head_start,
        accelerator="cpu",
        devices=1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=text)
    torch.save(module.state_dict(), path)
