"""Calibration: what a step, a probe and a validation batch of every task cost on this machine.

``calibrate`` measures, ``listing`` multiplies it out over the runs that are left.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch

from benchmarks.suites import ranking
from benchmarks.suites.overhead import ROUNDS, StepTimes
from benchmarks.suites.results import RESULTS, Results, slug
from benchmarks.suites.runner import Place
from benchmarks.suites.scales import PROBED
from benchmarks.suites.spec import Run, Task
from benchmarks.suites.start import made
from benchmarks.suites.train import machine
from benchmarks.tabular import markdown
from lightning_mat import mntk, partition
from lightning_mat.sampling import check_loader, draw

#: Steps that are timed, after some that are not.
TIMED, UNTIMED = 12, 4

Costs = dict[str, Any]


def calibrate(runs: Mapping[str, Sequence[Run]], place: Place) -> str:
    """Measure every task of some suites, keep the result, and return the listing."""
    path = _path(place)
    known = _read(path)
    tasks = {fingerprint(run.task): run.task for part in runs.values() for run in part}
    for key, task in tasks.items():
        known[key] = measure(task, place)
        cost = known[key]
        print(
            f"{task.model} {task.name}: step {cost['step'] * 1e3:.0f} ms, probe of "
            f"{task.n_samples} samples {cost['probe'] * 1e3:.0f} ms, validation "
            f"{cost['valid']:.1f} s, test {cost['test']:.1f} s",
            flush=True,
        )
        content = {"costs": known, "environment": machine(torch.device(place.device))}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return listing(runs, place)


def measure(task: Task, place: Place) -> Costs:
    """Return the seconds of a plain step, a probe, a validation and a test."""
    L.seed_everything(0, verbose=False)
    module, text = made(task, TIMED + UNTIMED, 0, place.data)
    times = StepTimes()
    trainer = L.Trainer(
        max_steps=TIMED + UNTIMED,
        accelerator="gpu" if place.device.startswith("cuda") else "cpu",
        devices=1,
        precision=task.precision,
        callbacks=[times],
        limit_val_batches=4,
        limit_test_batches=4,
        val_check_interval=TIMED + UNTIMED + 1,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=text)
    begin = time.perf_counter()
    trainer.validate(module, datamodule=text, verbose=False)
    batch_seconds = (time.perf_counter() - begin) / 4
    device = torch.device(place.device)
    module.to(device)
    part = partition(module, task.units)
    samples = draw(check_loader(text.train_dataloader(), task.n_samples), task.n_samples, 0, 0)
    samples = text.transfer_batch_to_device(samples, device, 0)
    probes = []
    for _ in range(3):
        begin = time.perf_counter()
        mntk(module, samples, part)
        probes.append(time.perf_counter() - begin)
    return {
        "task": asdict(task),
        "step": statistics.median(times.seconds[UNTIMED - 1 :]),
        "probe": statistics.median(probes),
        "valid": batch_seconds * len(text.val_dataloader()),
        "test": batch_seconds * len(text.test_dataloader()),
    }


def seconds(run: Run, cost: Costs) -> float:
    """Return what a run should take: steps, probes, validations and up to two tests.

    Every step counts as a full one, so that methods that skip or are short take less.
    """
    task = run.task
    if run.suite == "overhead":
        return 3 * ROUNDS * (task.steps * cost["step"] + cost["probe"])
    measured = run.method.policy in ("mat", "top", "bottom") and task.calendar == "steps"
    probes = max(0, math.ceil((task.steps - task.first) / task.every)) if measured else 0
    training = task.steps * cost["step"] + probes * cost["probe"]
    if run.suite == "ranking":  # two sets of samples of every size, for every output
        samples = (
            2
            * len(ranking.OUTPUTS)
            * len(ranking.POINTS)
            * sum({task.n_samples, *PROBED[run.scale]})
        )
        training += samples / task.n_samples * cost["probe"]
    return training + task.points * cost["valid"] + 2 * cost["test"]


def listing(runs: Mapping[str, Sequence[Run]], place: Place) -> str:
    """Return how many runs of every suite are done and left, and what they should take."""
    costs = _read(_path(place))
    rows, total = [], 0.0
    for name, part in runs.items():
        done = Results(name, place.device_name, place.results).read()
        left = [run for run in part if run.key not in done]
        known = [costs.get(fingerprint(run.task)) for run in part]
        all_seconds = [seconds(r, c) for r, c in zip(part, known, strict=True) if c]
        whole = len(all_seconds) == len(part)
        estimate = sum(all_seconds)
        total += estimate
        rows.append(
            [
                name,
                str(len(part)),
                str(len(left)),
                f"{estimate / len(part):.0f}" if whole else "not calibrated",
                f"{estimate / 60:.0f}" if whole else "not calibrated",
            ]
        )
    head = ["suite", "runs", "left", "seconds per run, at most", "minutes of all runs, at most"]
    if any("not calibrated" in row for row in rows):
        remedy = (
            "run `python -m benchmarks calibrate` with the same --scale and --data for estimates"
        )
        return f"{markdown(head, rows)}\n\n{remedy}"
    return f"{markdown(head, rows)}\n\nestimated in all, at most: {total / 3600:.1f} h"


def fingerprint(task: Task) -> str:
    """Return a key of everything that a step's cost depends on."""
    names = ("model", "size", "data", "batch_size", "units", "n_samples", "precision", "head_start")
    text = json.dumps({name: getattr(task, name) for name in names}, sort_keys=True)
    return f"{task.model}-{task.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _path(place: Place) -> Path:
    return (place.results or RESULTS) / f"calibration-{slug(place.device_name)}.json"


def _read(path: Path) -> dict[str, Costs]:
    return json.loads(path.read_text())["costs"] if path.is_file() else {}
