"""Suite ``ranking``: how stable the order of the units by λ_max is.

Plain training is stopped at three points. There, two disjoint sets of samples are probed, of as
many as the runs' own probes have and of 16, 64 and 256, with each of the scalar outputs.
Spearman's correlation of λ_max is taken inside each kind of unit: between the two sets, and between
outputs over the same samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import lightning as L
import torch
from torchmetrics.functional import spearman_corrcoef

from benchmarks.evidence import stability
from benchmarks.suites.noted import number
from benchmarks.suites.results import Line
from benchmarks.suites.scales import PROBED, tasks
from benchmarks.suites.spec import Method, Run, paired
from benchmarks.suites.train import train as train_run
from lightning_mat import Partition, mntk, partition
from lightning_mat.mntk.samples import take_samples
from lightning_mat.sampling import check_loader, draw

TITLE = "How stable the ranking by λ_max is"

OUTPUTS = ("sum_logits", "random", "loss")
#: Parts of the run after which is measured.
POINTS = (0.1, 0.5, 0.9)

__all__ = ["OUTPUTS", "POINTS", "TITLE", "Ranker", "report", "runs", "train"]


class Ranker(L.Callback):
    """Measures the stability of the ranking after some of the steps.

    Args:
        units: What can rest.
        steps: Steps of the run.
        sizes: Samples of a probe.
        seed: Of the samples.

    Attributes:
        found: One dict per point.
    """

    def __init__(self, units: str, steps: int, sizes: Sequence[int], seed: int) -> None:
        """Start with nothing measured."""
        self.units, self.sizes, self.seed = units, sizes, seed
        self.at = [max(1, round(part * steps)) for part in POINTS]
        self.found: list[dict[str, Any]] = []
        self._part: Partition | None = None

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Measure where a point is reached."""
        done = len(self.found)
        if done == len(self.at) or trainer.global_step < self.at[done]:
            return
        if self._part is None:
            self._part = partition(pl_module, self.units)
        most = max(self.sizes)
        loader = check_loader(trainer.train_dataloader, 2 * most)
        samples = trainer.strategy.batch_to_device(draw(loader, 2 * most, self.seed, done))
        spectra = {
            (output, size, start): mntk(
                pl_module,
                take_samples(samples, start * most, start * most + size),
                self._part,
                output=output,
                seed=self.seed,
            ).lambda_max
            for output in OUTPUTS
            for size in self.sizes
            for start in (0, 1)
        }
        self.found.append({"step": trainer.global_step, **correlations(spectra, self._part.kinds)})

    def state_dict(self) -> dict[str, Any]:
        """Return what was found so far."""
        return {"found": self.found}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.found = list(state_dict["found"])


def correlations(
    spectra: dict[tuple[str, int, int], torch.Tensor], kinds: Sequence[str]
) -> dict[str, Any]:
    """Return Spearman's correlations, by kind of unit.

    Args:
        spectra: λ_max, ``[L]``, by output, samples, and which of the two disjoint sets.
        kinds: Kind of every unit.

    Returns:
        ``samples``: ``{output: {size: {kind: ρ}}}`` between disjoint sets of equal size;
        ``outputs``: ``{"a vs b": {kind: ρ}}`` over the same, largest set. A kind with fewer than
        three units, or with equal values only, has None.
    """
    outputs = list(dict.fromkeys(output for output, _, _ in spectra))
    sizes = sorted({size for _, size, _ in spectra})
    members = {k: [i for i, kind in enumerate(kinds) if kind == k] for k in dict.fromkeys(kinds)}

    def by_kind(a: torch.Tensor, b: torch.Tensor) -> dict[str, float | None]:
        return {kind: spearman(a[own], b[own]) for kind, own in members.items()}

    return {
        "samples": {
            output: {
                str(size): by_kind(spectra[output, size, 0], spectra[output, size, 1])
                for size in sizes
            }
            for output in outputs
        },
        "outputs": {
            f"{a} vs {b}": by_kind(spectra[a, sizes[-1], 0], spectra[b, sizes[-1], 0])
            for i, a in enumerate(outputs)
            for b in outputs[i + 1 :]
        },
    }


def spearman(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """Return Spearman's rank correlation; None below three values, or where all are equal.

    Example:
        >>> spearman(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([4.0, 8.0, 9.0]))
        1.0
    """
    if len(a) < 3 or a.min() == a.max() or b.min() == b.max():
        return None
    return number(spearman_corrcoef(a.double(), b.double()), 4)


def runs(scale: str, seeds: Iterable[int]) -> list[Run]:
    """Return a plain run of every model."""
    return paired("ranking", scale, tasks(scale, "ranking"), [Method("full")], seeds)


def train(run: Run, needed: Line | None, **options: Any) -> Line | None:
    """Train a run and measure on the way."""
    sizes = sorted({run.task.n_samples, *PROBED[run.scale]})
    ranker = Ranker(run.task.units, run.task.steps, sizes, run.seed)
    line = train_run(run, needed, observer=ranker, **options)
    return line and {**line, "ranking": ranker.found}


def report(lines: list[Line]) -> str:
    """Return the correlations."""
    return stability.tables(lines)
