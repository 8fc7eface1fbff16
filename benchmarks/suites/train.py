"""Train one run through Lightning, in one go or in several, and return its line of results."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch

from benchmarks.suites.build import freeze_lower_half
from benchmarks.suites.methods import FOLLOWING, callback
from benchmarks.suites.noted import number, record_of, shares_trained
from benchmarks.suites.recorder import AfterEpisodes, Recorder
from benchmarks.suites.results import Line
from benchmarks.suites.spec import Run
from benchmarks.suites.start import made
from benchmarks.suites.stats import best_point
from examples.record import Clock, FullStepCost
from lightning_mat import MATCallback
from lightning_mat.report.environment import environment


class TimeIsUpError(Exception):
    """The time limit has come; the checkpoint is written."""


class _Stop(L.Callback):
    """Writes a checkpoint and stops once a moment has passed, never where a validation is due."""

    def __init__(self, deadline: float | None, path: Path, every: int) -> None:
        self.deadline, self.path, self.every = deadline, path, every

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        step = trainer.global_step
        # A validation comes after this hook: a run that resumed here would leave it out.
        if self.deadline is None or step % self.every == 0 or step >= (trainer.max_steps or 0):
            return
        if time.monotonic() >= self.deadline:
            aside = self.path.with_suffix(".part")
            trainer.save_checkpoint(aside)
            os.replace(aside, self.path)
            raise TimeIsUpError


def train(
    run: Run,
    needed: Line | None,
    *,
    data: Path | None,
    work: Path,
    device: str = "cpu",
    deadline: float | None = None,
    observer: L.Callback | None = None,
) -> Line | None:
    """Train and test one run, or go on with it.

    Args:
        run: What to train.
        needed: The line of the run that this one needs.
        data: Folder of the data sets.
        work: Folder of unfinished runs.
        device: ``"cpu"`` or ``"cuda"``.
        deadline: Moment of ``time.monotonic()`` at which to stop and keep a checkpoint.
        observer: Another callback of the Trainer.

    Returns:
        The line; None if the deadline came first.
    """
    task, folder = run.task, work / run.key
    steps = task.steps if run.method.plain != "short" else shortened(run, needed)
    L.seed_everything(run.seed, verbose=False)
    module, text = made(task, steps, run.seed, data)
    every = -(-steps // task.points)
    if task.metric == "accuracy" and len(text.train_dataloader()) < every:
        # The accuracy of training is that of whole epochs.
        every = -(-every // len(text.train_dataloader())) * len(text.train_dataloader())
    share = freeze_lower_half(module) if run.method.plain == "lower-half" else 1.0
    initial = digest(module)
    record = record_of(needed) if needed and run.method.policy in FOLLOWING else None
    special = callback(task, run.method, run.seed, record) or FullStepCost()
    own = device == "cpu" and torch.get_num_threads() == 1
    clock, last = Clock(own), folder / "last.ckpt"
    recorder = Recorder(clock, special, folder / "best.pt", task.metric, task.batch_size, share)
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="gpu" if device.startswith("cuda") else "cpu",
        devices=1,
        precision=task.precision,
        val_check_interval=every,
        check_val_every_n_epoch=None,
        # The stop is last: what the others noted of the step is in its checkpoint.
        callbacks=[
            *(recorder, clock, special, AfterEpisodes(recorder)),
            *([observer] if observer else []),
            _Stop(deadline, last, every),
        ],
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    folder.mkdir(parents=True, exist_ok=True)
    try:
        trainer.fit(module, datamodule=text, ckpt_path=last if last.is_file() else None)
    except TimeIsUpError:
        return None
    if recorder.curve[-1]["step"] != steps:
        trainer.validate(module, datamodule=text, verbose=False)
    line = {
        "key": run.key,
        **run.settings(),
        "steps": steps,
        "initial": initial,
        "batches": recorder.batches,
        "clock": "process" if own else "wall",
        "corpus": text.describe(),
        **spent(recorder, steps),
        "curve": recorder.curve,
        "episodes": recorder.episodes,
        **tested(trainer, module, text, recorder),
        "environment": machine(trainer.strategy.root_device),
    }
    shutil.rmtree(folder)
    return line


def shortened(run: Run, needed: Line | None) -> int:
    """Return how many plain steps cost what another run has cost, probes included.

    Raises:
        ValueError: If that run's line is missing.
    """
    if needed is None:
        raise ValueError(f"{run.label} needs the result of {run.method.like!r}: run that first")
    steps = round(needed["flops"] / needed["full_step_flops"])
    return max(run.task.points, min(steps, run.task.steps))


def spent(recorder: Recorder, steps: int) -> dict[str, Any]:
    """Return what a finished run has cost, and who trained."""
    cost = recorder.cost(steps)
    special = recorder.special
    found: dict[str, Any] = {
        **cost,
        "forward_flops": recorder.forward_flops,
        "full_step_flops": recorder.full_step_flops,
    }
    if isinstance(special, MATCallback):
        summary = special.summary()
        for name in ("probes", "probe_flops", "trained_share"):
            found[name] = number(summary[name])
        found["episode_seconds"] = round(recorder.episode_seconds, 3)
        found["units"] = len(special.mat.part) if special.mat else 0
    else:
        found |= {"probes": 0, "probe_flops": 0, "episode_seconds": 0.0}
        found["trained_share"] = recorder.plain_share
    if recorder.steps_trained is not None:
        found["shares_trained"] = shares_trained(recorder.steps_trained, steps)
    return found


def tested(
    trainer: L.Trainer, module: L.LightningModule, text: L.LightningDataModule, recorder: Recorder
) -> dict[str, Any]:
    """Return the test results after the last step and with the weights of the best validation."""
    found = {"test_end": _test(trainer, module, text)}
    found["test_best"] = found["test_end"]
    best = best_point(recorder.curve, recorder.metric, more=recorder.metric == "accuracy")
    if best is not None and best["step"] != trainer.global_step:
        module.load_state_dict(torch.load(recorder.best, weights_only=True))
        found["test_best"] = _test(trainer, module, text)
    found["best_step"] = best["step"] if best else None
    return found


def digest(module: torch.nn.Module) -> str:
    """Return a hash of all weights: equal where runs start alike."""
    state = hashlib.sha256()
    for name, value in module.state_dict().items():
        state.update(name.encode())
        state.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return state.hexdigest()[:16]


def machine(device: torch.device) -> Mapping[str, Any]:
    """Return the environment; the commit is the caller's where the sources have no history."""
    found = environment(device)
    return {**found, "commit": found["commit"] or os.environ.get("COMMIT")}


def _test(
    trainer: L.Trainer, module: L.LightningModule, text: L.LightningDataModule
) -> dict[str, float | None]:
    [metrics] = trainer.test(module, datamodule=text, verbose=False)
    return {
        name.removeprefix("test_"): number(value)
        for name, value in metrics.items()
        if name in ("test_loss", "test_accuracy")
    }
