"""What a run cost and reached: a clock and a FLOP counter for the Trainer, rows and their table."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch

from lightning_mat import flops


@dataclass(frozen=True)
class Row:
    """One method's result.

    Args:
        method: ``"full"``, ``"mat"`` or ``"random"``.
        test_loss: Mean cross-entropy over the masked words of the test split, nats.
        steps: Optimizer steps.
        flops: Floating-point operations of all training steps, probes among them, as counted from
            the operations that ran.
        seconds: Wall-clock time of training, probes among it, validation not.
        probe_flops: Part of ``flops`` that probes took.
        probe_seconds: Part of ``seconds`` that probes took.
        probes: How often the units were measured.
        trained_share: Mean over the steps of the share of units that trained.
        full_step_flops: Floating-point operations of one step that trains everything.
    """

    method: str
    test_loss: float
    steps: int
    flops: int
    seconds: float
    probe_flops: int
    probe_seconds: float
    probes: int
    trained_share: float
    full_step_flops: int


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a table that a person can read.

    Example:
        >>> row = Row("full", 6.5, 300, 4 * 10**12, 60.0, 0, 0.0, 0, 1.0, 10**10)
        >>> print(table([row]))
        method  test loss  steps  PFLOPs  seconds  probes' share  trained share
        ------  ---------  -----  ------  -------  -------------  -------------
        full        6.500    300   0.004     60.0           0.0%         100.0%
    """
    cells = [
        ("method", "test loss", "steps", "PFLOPs", "seconds", "probes' share", "trained share")
    ]
    for row in rows:
        cells.append(
            (
                row.method,
                f"{row.test_loss:.3f}",
                str(row.steps),
                f"{row.flops / 1e15:.4g}",
                f"{row.seconds:.1f}",
                f"{row.probe_seconds / row.seconds:.1%}" if row.seconds else "-",
                f"{row.trained_share:.1%}",
            )
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = [
        "  ".join(
            [
                line[0].ljust(widths[0]),
                *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True)),
            ]
        )
        for line in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


class Clock(L.Callback):
    """Measures the seconds of training without its validation; goes on where a checkpoint ended.

    Args:
        own: Measure the time that this process was given, of all its threads, and not the wall
            clock. For a run on one thread the two are equal on a machine that has nothing else to
            do; where it has, this one does not see it.
    """

    def __init__(self, own: bool = False) -> None:
        """Start at zero."""
        self._now = time.process_time if own else time.perf_counter
        self._before = 0.0
        self._since: float | None = None
        self._paused = False

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        running = 0.0 if self._since is None else self._now() - self._since
        return self._before + running

    def _start(self) -> None:
        _synchronize()
        self._since = self._now()

    def _stop(self) -> None:
        _synchronize()
        self._before, self._since = self.seconds, None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start."""
        self._start()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop."""
        self._stop()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Pause, if inside training."""
        self._paused = self._since is not None
        if self._paused:
            self._stop()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on, if inside training."""
        if self._paused:
            self._start()
        self._paused = False

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds so far."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from these seconds."""
        self._before = state_dict["seconds"]


class FullStepCost(L.Callback):
    """Counts the floating-point operations of the run's first step; plain training only.

    Every later step of plain training runs the same operations.
    """

    def __init__(self) -> None:
        """Start with nothing counted."""
        self.flops: int | None = None
        self._counting = ExitStack()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Begin to count unless a step was counted."""
        if self.flops is None:
            self._counter = self._counting.enter_context(flops.count())

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Keep the count."""
        if self.flops is None:
            self._counting.close()
            self.flops = int(self._counter.total)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Stop counting, so that nothing after a failed step is counted."""
        self._counting.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the count."""
        return {"flops": self.flops}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the count over."""
        self.flops = state_dict["flops"]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
