"""Recorder: what a run costs and reaches, noted at every validation, and who trained."""

from __future__ import annotations

import zlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils._pytree import tree_leaves

from benchmarks.suites.noted import episode, number
from examples.record import Clock, FullStepCost
from lightning_mat import MATCallback, flops
from lightning_mat.mntk.samples import count_samples


class Recorder(L.Callback):
    """Notes a point of the curve at every validation, and every episode's decision.

    It stands before the clock in the Trainer's callbacks: the clock is stopped while it works.

    Args:
        clock: Measures the seconds of training.
        special: What the method is: MATCallback, or the counter of plain training.
        best: File for the weights at the best validation.
        metric: ``"loss"`` or ``"accuracy"``: what "best" refers to.
        batch_size: Samples of a training step.
        plain_share: Share of the units that train where there is no MATCallback.

    Attributes:
        curve: One dict per validation.
        episodes: One dict per episode, without those of policies that decide every step.
        steps_trained: Steps in which each unit trained, int64 ``[L]``; None for plain training.
        forward_flops: FLOPs of a forward pass over one sample; 0 before the first validation.
        full_step_flops: FLOPs of a step in which everything trains; 0 before the second step.
        batches: Checksums of the first batches, equal where data order and masks are.
        episode_seconds: What it took to begin all episodes: to look at the model, to draw samples,
            to probe, to decide and to make gate and optimizer follow.
    """

    #: Batches of which the checksum is noted.
    BATCHES = 8

    def __init__(
        self,
        clock: Clock,
        special: MATCallback | FullStepCost,
        best: Path,
        metric: str,
        batch_size: int,
        plain_share: float = 1.0,
    ) -> None:
        """Start with nothing noted."""
        self.clock, self.special, self.best, self.metric = clock, special, best, metric
        self.batch_size, self.plain_share = batch_size, plain_share
        self.curve: list[dict[str, Any]] = []
        self.episodes: list[dict[str, Any]] = []
        self.steps_trained: torch.Tensor | None = None
        self.forward_flops = 0.0
        self.full_step_flops = 0.0
        self.batches: list[int] = []
        self.episode_seconds = 0.0
        self._episode, self._since = 0, 0.0
        self._counting = ExitStack()

    # ---- training ------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note when the look at the model begins."""
        self._since = self.clock.seconds

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note which batch comes."""
        if len(self.batches) < self.BATCHES:
            self.batches.append(checksum(batch))
        self._since = self.clock.seconds

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Note who trained."""
        if isinstance(self.special, FullStepCost):
            self.full_step_flops = float(self.special.flops or 0)
            return
        mat = self.special.mat
        if mat is None:
            return
        if not self.full_step_flops:  # of the first step, in the warm-up
            self.full_step_flops = mat.full_cost * self.batch_size
        if self.steps_trained is None:
            self.steps_trained = torch.zeros(len(mat.part), dtype=torch.int64)
        self.steps_trained += mat.active
        if mat.episode != self._episode:
            self._episode = mat.episode
            if getattr(mat.policy, "every_n_steps", None) is None:
                self.episodes.append({"step": trainer.global_step - 1, **episode(mat)})

    def end_of_turn(self) -> None:
        """Add the time since this callback's own turn, in which only MATCallback's has been."""
        self.episode_seconds += self.clock.seconds - self._since

    # ---- validation ----------------------------------------------------------------------------

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the forward pass of the first batch of the first validation."""
        if not self.forward_flops:
            self._counter = self._counting.enter_context(flops.count())

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the count."""
        if not self.forward_flops:
            self._counting.close()
            self.forward_flops = self._counter.total / count_samples(batch)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note a point of the curve; keep the weights if they are the best so far."""
        found = {
            name: number(trainer.callback_metrics[f"val_{name}"])
            for name in ("loss", "accuracy")
            if f"val_{name}" in trainer.callback_metrics
        }
        seen = getattr(pl_module, "train_accuracy", None)
        if seen is not None and seen.update_called:  # of the epoch so far
            found["train_accuracy"] = number(seen.compute())
        better = self._better(found[self.metric])
        self.curve.append({"step": trainer.global_step, **self.cost(trainer.global_step), **found})
        if better:
            self.best.parent.mkdir(parents=True, exist_ok=True)
            torch.save(pl_module.state_dict(), self.best)

    def _better(self, value: float | None) -> bool:
        """Return whether a value is better than all points of the curve."""
        if value is None:
            return False
        sign = -1 if self.metric == "loss" else 1
        before = [p[self.metric] for p in self.curve if p[self.metric] is not None]
        return all(sign * value > sign * other for other in before)

    def cost(self, steps: int) -> dict[str, float]:
        """Return seconds and FLOPs so far: as counted, and by the paper's rule; probes included."""
        if isinstance(self.special, MATCallback):
            summary = self.special.summary()
            counted, probes = summary["flops"], summary["probe_flops"]
            share = summary["trained_share"]
        else:
            counted, probes, share = self.full_step_flops * steps, 0, self.plain_share
        forward = self.forward_flops * self.batch_size
        paper = flops.paper_flops(forward, share) * steps + probes
        return {
            "seconds": round(self.clock.seconds, 3),
            "flops": float(counted),
            "paper_flops": float(paper),
        }

    # ---- state ---------------------------------------------------------------------------------

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Stop counting."""
        self._counting.close()

    def state_dict(self) -> dict[str, Any]:
        """Return plain types and tensors."""
        return {
            "curve": self.curve,
            "episodes": self.episodes,
            "steps_trained": self.steps_trained,
            "forward_flops": self.forward_flops,
            "full_step_flops": self.full_step_flops,
            "batches": self.batches,
            "episode_seconds": self.episode_seconds,
            "episode": self._episode,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved run."""
        self.curve, self.episodes = list(state_dict["curve"]), list(state_dict["episodes"])
        self.steps_trained = state_dict["steps_trained"]
        self.forward_flops = state_dict["forward_flops"]
        self.full_step_flops = state_dict["full_step_flops"]
        self.batches = list(state_dict["batches"])
        self.episode_seconds = state_dict["episode_seconds"]
        self._episode = state_dict["episode"]


class AfterEpisodes(L.Callback):
    """Stands behind MATCallback: what passed since the recorder's turn began an episode.

    Args:
        recorder: Where it is noted.
    """

    def __init__(self, recorder: Recorder) -> None:
        """Note nothing yet."""
        self.recorder = recorder

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note what the look at the model has taken."""
        self.recorder.end_of_turn()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note what an episode that began has taken."""
        self.recorder.end_of_turn()


def checksum(batch: Any) -> int:
    """Return the CRC-32 of all tensors of a batch.

    Example:
        >>> checksum({"a": torch.tensor([1])}) == checksum([torch.tensor([1])])
        True
    """
    found = 0
    for leaf in tree_leaves(batch):
        if isinstance(leaf, torch.Tensor):
            found = zlib.crc32(leaf.detach().cpu().contiguous().view(torch.uint8).numpy(), found)
    return found
