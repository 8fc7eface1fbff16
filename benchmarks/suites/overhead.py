"""Suite ``overhead``: what the callback costs beside plain Lightning (appendix B.3).

Machines drift, so short fits of the three ways alternate in one run, and ratios are taken within a
round: plain Lightning; MATCallback in which everything trains; MATCallback that probes and decides
but lets everything train (``dry_run``).
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import torch

from benchmarks.evidence import overhead
from benchmarks.suites.methods import PAPER, callback
from benchmarks.suites.results import Line
from benchmarks.suites.scales import tasks
from benchmarks.suites.spec import Method, Run, Task, paired
from benchmarks.suites.start import made
from benchmarks.suites.train import machine
from examples.record import Clock
from lightning_mat import MATCallback

TITLE = "What the callback and its probes cost"

#: Alternating rounds of a run.
ROUNDS = 7
#: Steps at the beginning of a fit that are not timed: they allocate, and FLOPs are counted.
UNTIMED = 5

__all__ = ["TITLE", "report", "runs", "train"]


class StepTimes(L.Callback):
    """Notes the seconds from the beginning of one step to that of the next."""

    def __init__(self, own: bool = False) -> None:
        """Start with nothing noted; ``own`` as for the clock."""
        self.seconds: list[float] = []
        self._clock = Clock(own)
        self._last = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start."""
        self._clock.on_train_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the step that has ended."""
        now = self._clock.seconds
        if trainer.global_step:
            self.seconds.append(now - self._last)
        self._last = now


def _ways(task: Task, seed: int) -> dict[str, MATCallback | None]:
    active = Method("active", "full")
    probing = Method("probing", "mat", PAPER[task.model], {"dry_run": True})
    return {
        "plain": None,
        "active": callback(task, active, seed),
        "probing": callback(task, probing, seed),
    }


def measure(task: Task, seed: int, data: Path | None, device: str) -> dict[str, dict[str, float]]:
    """Return one round: per way the median seconds of a step, and what its probes took."""
    found = {}
    for name, special in _ways(task, seed).items():
        L.seed_everything(seed, verbose=False)
        module, text = made(task, task.steps, seed, data)
        times = StepTimes(own=device == "cpu" and torch.get_num_threads() == 1)
        trainer = L.Trainer(
            max_steps=task.steps,
            accelerator="gpu" if device.startswith("cuda") else "cpu",
            devices=1,
            precision=task.precision,
            callbacks=[times, *([special] if special else [])],
            limit_val_batches=0,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=text)
        found[name] = {"step_seconds": statistics.median(times.seconds[UNTIMED:])}
        if special is not None and special.policy.needs_spectra:
            summary = special.summary()
            found[name]["probe_seconds"] = summary["probe_seconds"] / summary["probes"]
            found[name]["probe_flops"] = summary["probe_flops"] / summary["probes"]
            found[name]["full_step_flops"] = summary["full_step_flops"] * task.batch_size
    return found


def runs(scale: str, seeds: Iterable[int]) -> list[Run]:
    """Return one run per model, in which the ways alternate."""
    method = Method("interleaved", arguments={"rounds": ROUNDS})
    return paired("overhead", scale, tasks(scale, "overhead"), [method], seeds)


def train(
    run: Run,
    needed: Line | None,
    *,
    data: Path | None,
    work: Path,
    device: str = "cpu",
    deadline: float | None = None,
) -> Line | None:
    """Measure all rounds, or go on with them; see :func:`benchmarks.suites.train.train`."""
    folder = work / run.key
    kept = folder / "rounds.json"
    rounds: list[Any] = json.loads(kept.read_text()) if kept.is_file() else []
    folder.mkdir(parents=True, exist_ok=True)
    while len(rounds) < run.method.arguments["rounds"]:
        if deadline is not None and time.monotonic() >= deadline:
            return None
        rounds.append(measure(run.task, run.seed, data, device))
        aside = kept.with_suffix(".part")
        aside.write_text(json.dumps(rounds))
        os.replace(aside, kept)
    environment = machine(torch.device(device))
    line = {"key": run.key, **run.settings(), "rounds": rounds, "environment": environment}
    shutil.rmtree(folder)
    return line


def report(lines: list[Line]) -> str:
    """Return what a step and a probe cost more than plain Lightning's."""
    return overhead.table(lines)
