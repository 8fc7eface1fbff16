"""MATCallback: Lightning's calendar for modular adaptive training, nothing else."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from lightning_mat.engine import MAT
from lightning_mat.gate.gate import SKIPS
from lightning_mat.ledger import Ledger
from lightning_mat.mntk.outputs import Forward, Output, check_output
from lightning_mat.mntk.probe import check_settings
from lightning_mat.mntk.samples import count_samples
from lightning_mat.policies import MAT as MATPolicy
from lightning_mat.policies import Policy
from lightning_mat.report.store import Probe, SpectraStore
from lightning_mat.sampling import check_loader, draw

log = logging.getLogger(__name__)

Threshold = float | str | Mapping[str, float]


class MATCallback(Callback):
    """Train with modular adaptive training: add it to a ``Trainer``'s callbacks.

    At the beginning of every episode it draws ``n_samples`` from the training set, measures the
    principal eigenvalue of every unit's mNTK, decides which units train until the next episode, and
    makes the backward pass and the optimizers skip the others. Afterwards the model is an ordinary
    one.

    Args:
        units: What can rest: ``"auto"``, ``"heads"``, ``"ffn"``, ``"experts"``, ``"filters"``,
            ``"layers"``, a combination such as ``"heads+ffn"``, rules, a callable or a
            :class:`~lightning_mat.Partition`; see :func:`lightning_mat.partition`.
        policy: Who trains next; the paper's, :class:`lightning_mat.policies.MAT`, by default.
        alpha: Share α of the eigenvalues' range above which a unit trains (equation 4), in (0, 1);
            a number, ``"auto"``, or one of them per kind. Only without ``policy``.
        beta: A unit rests when its λ_max changes by less than this share of its first change
            (equation 6), ≥ 0; a number or one per kind. Only without ``policy``.
        every_n_epochs: Epochs per episode.
        every_n_steps: Optimizer steps per episode, in the place of ``every_n_epochs``.
        warmup_epochs: Epochs before the first probe, in which everything trains.
        n_samples: S, the samples of a probe, at least 2.
        output: The scalar per sample: ``"sum_logits"``, ``"random"``, ``"loss"`` or a callable
            ``(module, batch) -> [S]``; see :func:`lightning_mat.mntk`.
        skip: What the backward pass skips: ``"weights"``.
        protect: Keep at least one unit per layer and kind training. Only without ``policy``.
        dry_run: Measure, decide, log and draw, but let everything train.
        seed: Of the samples that are drawn and of ``output="random"``.
        forward: ``(module, batch) -> logits``; by default the module is called with the batch's
            inputs.
        precision: Of the probe: ``"float32"``, ``"tf32"`` or ``"bf16"``.
        memory: Bytes that a probe may take above the model; ``"auto"`` for what a training step
            takes.
        probe_data: Where to draw the samples from instead of the training set; its dataset and its
            ``collate_fn`` are used.
        keep_eigenvalues: Keep the full spectra on the disk, not only their extremes.

    Raises:
        ValueError: At construction for a number out of range, at the start of a fit for a model,
            optimizer or data set that it cannot work with. Messages name it and the remedy.

    Source:
        Shi et al. (NeurIPS 2023), algorithm 1 and appendix B.

    Example:
        >>> callback = MATCallback(units="heads", warmup_epochs=5, every_n_epochs=8)
        >>> MATCallback(n_samples=1)
        Traceback (most recent call last):
            ...
        ValueError: n_samples must be ≥ 2, got 1: an mNTK needs at least two samples
    """

    def __init__(
        self,
        units: Any = "auto",
        policy: Policy | None = None,
        alpha: Threshold = 0.1,
        beta: float | Mapping[str, float] = 1e-3,
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        warmup_epochs: int = 1,
        n_samples: int = 64,
        output: Output = "sum_logits",
        skip: str = "weights",
        protect: bool = True,
        dry_run: bool = False,
        seed: int = 0,
        forward: Forward | None = None,
        precision: str = "float32",
        memory: str | int = "auto",
        probe_data: DataLoader[Any] | None = None,
        keep_eigenvalues: bool = True,
    ) -> None:
        super().__init__()
        if isinstance(n_samples, int) and n_samples < 2:
            raise ValueError(
                f"n_samples must be ≥ 2, got {n_samples}: an mNTK needs at least two samples"
            )
        for name, value, least in (
            ("n_samples", n_samples, 2),
            ("every_n_epochs", every_n_epochs, 1),
            ("every_n_steps", 1 if every_n_steps is None else every_n_steps, 1),
            ("warmup_epochs", warmup_epochs, 0),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number ≥ {least}, got {value}")
        if every_n_steps is not None and every_n_epochs != 1:
            raise ValueError(
                f"every_n_epochs={every_n_epochs} and every_n_steps={every_n_steps} are two "
                "calendars: give one"
            )
        if policy is not None and (alpha, beta, protect) != (0.1, 1e-3, True):
            raise ValueError(
                "alpha, beta and protect belong to the default policy, but policy= is given, too: "
                f"pass them to {type(policy).__name__}(...)"
            )
        if skip not in SKIPS:
            raise ValueError(f"skip must be one of {SKIPS}, got {skip!r}")
        check_output(output)
        check_settings(precision, memory)
        self.policy: Policy = MATPolicy(alpha, beta, protect=protect) if policy is None else policy
        self.every_n_epochs, self.every_n_steps = every_n_epochs, every_n_steps
        self.warmup_epochs, self.n_samples, self.seed = warmup_epochs, n_samples, seed
        self.dry_run, self.probe_data = dry_run, probe_data
        self.keep_eigenvalues = keep_eigenvalues
        self._units, self._skip = units, skip
        self._engine_options: dict[str, Any] = {
            "output": output,
            "forward": forward,
            "precision": precision,
            "memory": memory,
        }
        self.mat: MAT | None = None
        """The engine, from the start of a fit on."""
        self._restored: dict[str, Any] | None = None
        self._store: SpectraStore | None = None
        self._loaded: dict[str, Any] = {}
        self._ledger = Ledger()
        self._decided_at = -1

    # ---- when to probe ---------------------------------------------------------------------

    def should_probe(self, trainer: pl.Trainer, batch_idx: int) -> bool:
        """Return whether an episode begins before this batch; override it for another calendar."""
        if trainer.current_epoch < self.warmup_epochs or self._decided_at == trainer.global_step:
            return False
        if self.every_n_steps is not None:
            begun = max(self._decided_at, 0)
            first = self._decided_at < 0
            return first or trainer.global_step - begun >= self.every_n_steps
        return (
            batch_idx == 0
            and (trainer.current_epoch - self.warmup_epochs) % self.every_n_epochs == 0
        )

    # ---- the calendar ----------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that this run can be trained with MAT, and begin anew."""
        if stage != "fit":
            return
        self._ledger, self._decided_at, self._restored = Ledger(), -1, None
        if self.mat is not None:
            for optimizer in self.mat.optimizers:
                optimizer.unwrap()
        others = [c for c in trainer.callbacks if isinstance(c, MATCallback)]  # type: ignore[attr-defined]
        if len(others) > 1:
            raise ValueError(
                f"the trainer has {len(others)} MATCallbacks, but only one can decide which units "
                "train: keep one"
            )
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"{type(pl_module).__name__} uses manual optimization, where MATCallback cannot "
                "tell when a step begins: use automatic optimization, or lightning_mat.MAT in your "
                "own loop"
            )
        if trainer.world_size > 1:
            raise ValueError(
                f"MATCallback runs in one process so far, this run has {trainer.world_size}: use "
                "Trainer(devices=1)"
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Partition the model and wrap its optimizers."""
        self.mat = MAT(
            pl_module,
            trainer.optimizers,
            self._units,
            self.policy,
            skip=self._skip,
            dry_run=self.dry_run,
            seed=self.seed,
            **self._engine_options,
        )
        if isinstance(self.policy, MATPolicy):
            self.policy.check_kinds(self.mat.part.kinds)
        if getattr(self.policy, "budget", None) is not None and not self.warmup_epochs:
            raise ValueError(
                "a policy with a budget needs the cost of a full step, which is counted in the "
                "warm-up: set warmup_epochs to at least 1"
            )
        trainer.strategy.optimizers = list(self.mat.optimizers)
        self._restore()
        log.info("MAT trains these units adaptively:\n%s", self.mat.part.describe())

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the data, and take up a restored run's decision."""
        mat = self._mat()
        self._restore()
        mat.apply()
        if self.policy.needs_spectra:
            mat.prepare(self._samples_for_probe(trainer))
        self._ledger.recount()
        folder = trainer.log_dir or trainer.default_root_dir
        path = Path(folder) / "mat" / "spectra.npz"
        self._store = SpectraStore(path, keep_eigenvalues=self.keep_eigenvalues)
        if trainer.global_step:
            self._try_to_write(lambda store: store.truncate(trainer.global_step))
        elif trainer.is_global_zero and path.exists():
            self._try_to_write(lambda store: _move_aside(store.path.parent))

    def on_train_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Begin an episode where one is due; count the FLOPs of its first step."""
        if self.should_probe(trainer, batch_idx):
            self._begin_episode(trainer, pl_module, batch)
        self._ledger.begin()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Account for the step."""
        mat = self._mat()
        samples = _samples(batch)
        share = float(mat.active.double().mean())
        if self._ledger.end(samples, share):
            per_sample = self._ledger.flops_per_sample
            resting = float(mat.table().cost[~mat.active].sum())
            if resting == 0 or mat.full_cost == 0:
                mat.full_cost = per_sample + resting
            counted = {
                "step_flops": per_sample * samples,
                "full_step_flops": mat.full_cost * samples,
            }
            self._log(trainer, counted, max(self._decided_at, 0))
        pl_module.log("trained", share, prog_bar=True, logger=False, batch_size=samples)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if the calendar never came to a probe."""
        mat = self._mat()
        if mat.episode == 0 and mat.probes == 0:
            warnings.warn(
                f"MAT never measured: training ended after {trainer.current_epoch} epochs and "
                f"{trainer.global_step} steps, before its first episode (warmup_epochs="
                f"{self.warmup_epochs}). Lower warmup_epochs, and set every_n_steps if an epoch "
                "is long",
                stacklevel=2,
            )

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Leave an ordinary model behind, whatever happened."""
        self._close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave an ordinary model behind.

        The optimizers stay wrapped, with everything training, so that a checkpoint saved after the
        fit still knows how many steps each unit has made.
        """
        if stage == "fit":
            self._close()

    # ---- state -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain types; loads under ``torch.load(weights_only=True)``."""
        if self.mat is None or self._restored is not None:
            return self._loaded
        return {
            "mat": self.mat.state_dict(),
            "decided_at": self._decided_at,
            "ledger": self._ledger.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a saved run's state until its training starts."""
        self._loaded = state_dict
        if not state_dict:
            return
        self._restored = state_dict["mat"]
        self._decided_at = int(state_dict["decided_at"])
        self._ledger.load_state_dict(state_dict["ledger"])

    def summary(self) -> dict[str, float | int]:
        """Return what the run has cost so far.

        Returns:
            ``flops``: counted, of the training steps and the probes. ``probe_flops``: of the
            probes. ``probe_seconds`` and ``seconds``: wall clock, of the probes, and of the
            training batches and the probes. ``trained_share``: mean share of the units that
            trained, over the batches. ``full_step_flops``: per sample, with everything training,
            as counted in the warm-up; without one, the first step's plus the weight gradients of
            what rested in it, which is a lower bound.
            ``probes``: how many.
        """
        mat = self._mat()
        return {
            "flops": self._ledger.flops + mat.probe_flops,
            "probe_flops": mat.probe_flops,
            "probe_seconds": mat.probe_seconds,
            "seconds": self._ledger.seconds + mat.probe_seconds,
            "trained_share": self._ledger.trained_share,
            "full_step_flops": int(mat.full_cost),
            "probes": mat.probes,
        }

    # ---- details ---------------------------------------------------------------------------

    def _restore(self) -> None:
        """Take up a saved run's state, once it and the engine are both there."""
        if self._restored is not None and self.mat is not None:
            self.mat.load_state_dict(self._restored)
            self._restored, self._loaded = None, {}

    def _mat(self) -> MAT:
        if self.mat is None:
            raise RuntimeError("MATCallback has not seen a fit yet: call Trainer.fit first")
        return self.mat

    def _loader(self, trainer: pl.Trainer) -> object:
        return trainer.train_dataloader if self.probe_data is None else self.probe_data

    def _begin_episode(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
    ) -> None:
        mat = self._mat()
        before, probes = mat.decision, mat.probes
        spent = mat.probe_seconds
        mat.probe.step_samples = _samples(batch)
        samples = self._samples_for_probe(trainer) if self.policy.needs_spectra else None
        decision = mat.update(samples, step=trainer.global_step, epoch=trainer.current_epoch)
        self._decided_at = trainer.global_step
        if not torch.equal(before.active, decision.active):
            self._ledger.recount()
        seconds = mat.probe_seconds - spent
        self._log(trainer, _metrics(mat, seconds), trainer.global_step)
        if mat.probes > probes and decision is not before:
            self._keep(mat, seconds, trainer)
        for line in decision.summary().splitlines():
            rank_zero_info(f"MAT at step {trainer.global_step}: {line}")

    def _samples_for_probe(self, trainer: pl.Trainer) -> Any:
        """Return a batch from the training set, on the device, as a training step would get it."""
        loader = check_loader(self._loader(trainer), self.n_samples)
        batch = draw(loader, self.n_samples, self.seed, self._mat().probes)
        batch = trainer.precision_plugin.convert_input(batch)
        batch = trainer.lightning_module._on_before_batch_transfer(batch)
        return trainer.strategy.batch_to_device(batch)

    def _keep(self, mat: MAT, seconds: float, trainer: pl.Trainer) -> None:
        """Append the probe to the run's file."""
        if mat.spectra is None or not trainer.is_global_zero:
            return
        step, epoch = trainer.global_step, trainer.current_epoch
        probe = Probe(mat.spectra, mat.decision, mat.table(), step, epoch, seconds)
        self._try_to_write(lambda store: store.append(probe))

    def _try_to_write(self, write: Callable[[SpectraStore], None]) -> None:
        """Write the run's file; a full disk costs one warning, not the run."""
        if self._store is None:
            return
        try:
            write(self._store)
        except (OSError, ValueError) as error:
            warnings.warn(
                f"cannot write the spectra to {self._store.path} ({error}): training goes on "
                "without them",
                stacklevel=2,
            )
            self._store = None

    def _log(self, trainer: pl.Trainer, metrics: Mapping[str, float], step: int) -> None:
        for logger in trainer.loggers:
            named = {f"mat/{name}": value for name, value in metrics.items()}
            logger.log_metrics(named, step=step)

    def _close(self) -> None:
        self._ledger.close()
        if self.mat is not None:
            self.mat.close()


def _move_aside(folder: Path) -> None:
    """Rename an earlier run's folder, so that a new run neither mixes with it nor loses it."""
    number = 1
    while folder.with_name(f"{folder.name}.{number}").exists():
        number += 1
    folder.rename(folder.with_name(f"{folder.name}.{number}"))


def _samples(batch: Any) -> int:
    """Return the samples of a training batch, 1 where they cannot be told."""
    try:
        return max(count_samples(batch), 1)
    except ValueError:
        return 1


def _metrics(mat: MAT, seconds: float) -> dict[str, float]:
    """Return what is logged at the beginning of an episode."""
    metrics = {"trained_share": float(mat.active.double().mean()), "probe_seconds": seconds}
    for kind, (trained, total) in mat.decision.by_kind().items():
        metrics[f"{kind}/trained"] = trained
        metrics[f"{kind}/units"] = total
        if mat.spectra is not None:
            chosen = torch.tensor([k == kind for k in mat.part.kinds])
            values = mat.spectra.lambda_max[chosen]
            for percent in (0, 25, 50, 75, 100):
                quantile = torch.nanquantile(values, percent / 100)
                metrics[f"{kind}/lambda_max_q{percent}"] = float(quantile)
    for kind, threshold in mat.decision.thresholds.items():
        metrics[f"{kind}/threshold"] = threshold
    return metrics
