"""MATCallback: Lightning's calendar for modular adaptive training, nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from lightning_mat.checks import check_switches, check_whole
from lightning_mat.engine import MAT
from lightning_mat.gate.gate import SKIPS
from lightning_mat.ledger import Ledger
from lightning_mat.mapping import check_partition_change
from lightning_mat.metrics import episode_metrics, run_summary
from lightning_mat.mntk.alignment import check_alignment
from lightning_mat.mntk.extent import Extent
from lightning_mat.mntk.outputs import Forward, Output, check_output, default_forward
from lightning_mat.mntk.probe import check_settings
from lightning_mat.optim.waking import WAKING
from lightning_mat.parallel.ready import Ready
from lightning_mat.parallel.strategy import MATDDPStrategy
from lightning_mat.policies import MAT as MATPolicy
from lightning_mat.policies import Policy
from lightning_mat.policies.check import check_policy, check_thresholds
from lightning_mat.presets import paper_settings
from lightning_mat.report.keeper import Keeper
from lightning_mat.report.store import Probe
from lightning_mat.run import (
    check_run,
    in_default_dtype,
    log_metrics,
    probe_batch,
    ranks_of,
    run_folder,
    samples_of,
)
from lightning_mat.schedule import Schedule, steps_per_episode

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
            a number, ``"auto"``, or one of them per kind; by default 0.1, for filters ``"auto"``.
            Only without ``policy``.
        beta: A unit rests when its λ_max changes by less than this share of its first change
            (equation 6), ≥ 0; a number or one per kind. Only without ``policy``.
        every_n_epochs: Epochs per episode.
        every_n_steps: Optimizer steps per episode, in the place of ``every_n_epochs``. Policies
            with a calendar of their own (:class:`lightning_mat.policies.Multirate`) allow no other.
        warmup_epochs: Epochs before the first probe, in which everything trains.
        n_samples: S, the samples of a probe, at least 2.
        output: The scalar per sample: ``"sum_logits"``, ``"random"``, ``"loss"`` or a callable
            ``(module, batch) -> [S]``; see :func:`lightning_mat.mntk`.
        skip: What the backward pass skips: ``"weights"``, the weight gradients of resting units,
            which changes nothing else; or ``"units"``, also the gradients through them, as if their
            outputs were detached. See :class:`lightning_mat.Gate`.
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
        waking: What becomes of the optimizer's state of a unit that wakes: ``"keep"``, ``"reset"``
            or ``"decay"``; see :class:`lightning_mat.MATOptimizer`.
        freeze_bn: Whether BatchNorm's running statistics of resting filters stop; see
            :class:`lightning_mat.Gate`.
        on_partition_change: What becomes of a checkpoint of other units: ``"refuse"`` it, with the
            units that differ, or ``"map"`` it: units of the same name and slices keep their
            history, decision and optimizer state, others train.

    Decisions change between optimizer steps only: while gradients are being accumulated, an episode
    that is due waits for the step. With manual optimization a batch without a call of
    ``optimizer.step()`` counts as accumulation; with several optimizers Lightning's
    ``global_step``, which ``every_n_steps`` refers to, counts the steps of all.

    Probes are appended to ``mat/spectra.npz`` in the folder of the trainer's first logger. With
    ``Trainer(logger=False)`` nothing is written: ``callback.mat.history`` and checkpoints hold the
    extremes.

    In several processes (``strategy="ddp"`` or ``"ddp_mat"``) every rank measures a share of the
    units and all follow one decision; with ``"ddp_mat"``, see
    :class:`lightning_mat.parallel.MATDDPStrategy`, gradients of what rests do not travel. With
    ``ModelParallelStrategy`` and ``fully_shard`` on each block a probe needs memory for the whole
    model on every rank, see ``docs/scaling.md``. FLOPs and seconds are those of one process, of a
    probe's FLOPs the mean over the processes.

    Parameters that are frozen when the fit starts stay frozen and belong to no unit. Those that are
    unfrozen later, for instance by Lightning's ``BaseFinetuning``, always train.

    Raises:
        TypeError: At construction, for a policy that is none.
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
        alpha: Threshold | None = None,
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
        waking: str = "keep",
        freeze_bn: bool = False,
        on_partition_change: str = "refuse",
    ) -> None:
        super().__init__()
        if not isinstance(n_samples, int) or isinstance(n_samples, bool):
            raise ValueError(f"n_samples must be a whole number ≥ 2, got {n_samples}")
        if n_samples < 2:
            raise ValueError(
                f"n_samples must be ≥ 2, got {n_samples}: an mNTK needs at least two samples"
            )
        check_whole("seed", seed, 0)
        check_switches(
            protect=protect,
            dry_run=dry_run,
            keep_eigenvalues=keep_eigenvalues,
            freeze_bn=freeze_bn,
        )
        if policy is not None:
            check_policy(policy)
            check_thresholds(policy, alpha=alpha, beta=beta, protect=protect)
        own_steps = steps_per_episode(policy, every_n_epochs, every_n_steps)
        self.schedule = Schedule(every_n_epochs, own_steps, warmup_epochs)
        if skip not in SKIPS:
            raise ValueError(f"skip must be one of {SKIPS}, got {skip!r}")
        if waking not in WAKING:
            raise ValueError(f"waking must be one of {WAKING}, got {waking!r}")
        check_partition_change(on_partition_change)
        check_output(output)
        check_settings(precision, memory)
        self.policy: Policy = MATPolicy(alpha, beta, protect=protect) if policy is None else policy
        if getattr(self.policy, "needs_alignment", False):
            check_alignment(output)
        self.n_samples, self.seed = n_samples, seed
        self.dry_run, self.probe_data = dry_run, probe_data
        self.keep_eigenvalues = keep_eigenvalues
        self._units, self._output = units, output
        self._forward = forward or default_forward
        self._engine_options: dict[str, Any] = {
            "precision": precision,
            "memory": memory,
            "skip": skip,
            "waking": waking,
            "freeze_bn": freeze_bn,
            "on_partition_change": on_partition_change,
        }
        self.mat: MAT | None = None
        """The engine, from the start of a fit on."""
        self._restored: dict[str, Any] | None = None
        self._undecided: dict[str, Any] | None = None
        self._keeper = Keeper(None)
        self._ready: Ready | None = None
        self._order: list[str] = []
        self._stage = ""
        self._loaded: dict[str, Any] = {}
        self._ledger = Ledger()
        self._said_in_full = self._is_of_last_fit = False
        own = getattr(self.policy, "every_n_steps", None)
        self._steps_alone = own is not None and not self.policy.needs_spectra
        self._step_before = 0

    @classmethod
    def paper(cls, which: str, **overrides: Any) -> MATCallback:
        """Return a callback with the settings of one of the MAT paper's experiments.

        Args:
            which: ``"bert"``, ``"switch"`` or ``"vgg"``; :mod:`lightning_mat.presets` has the
                settings and where the paper says them.
            overrides: Arguments that replace those settings. A ``policy`` replaces the thresholds
                and the protection, too.

        Raises:
            ValueError: If there is no such preset.

        Example:
            >>> MATCallback.paper("bert", n_samples=32).schedule.every_n_epochs
            8
        """
        return cls(**paper_settings(which, overrides))

    # ---- when to probe ---------------------------------------------------------------------

    def should_probe(self, trainer: pl.Trainer, batch_idx: int) -> bool:
        """Return whether an episode begins before this batch; override it for another calendar."""
        return self.schedule.is_due(trainer.current_epoch, trainer.global_step, batch_idx)

    # ---- the calendar ----------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that this run can be trained with MAT, and begin anew."""
        self._stage = stage
        if stage != "fit":
            return
        self._ledger, self._restored = Ledger(remember=self._steps_alone), None
        self._said_in_full = False
        self._undecided, self._order = None, []
        # What tuners save before this fit has an engine is not the state of the last one.
        self._loaded, self._is_of_last_fit = {}, self.mat is not None
        self.schedule.begin()
        if self.mat is not None:
            for optimizer in self.mat.optimizers:
                optimizer.unwrap()
        check_run(trainer, MATCallback)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Partition the model and wrap its optimizers."""
        self._is_of_last_fit = False
        output = self._output
        if callable(output):
            output = in_default_dtype(trainer, output)
        self.mat = MAT(
            pl_module,
            trainer.optimizers,
            self._units,
            self.policy,
            dry_run=self.dry_run,
            seed=self.seed,
            ranks=ranks_of(trainer),
            forward=in_default_dtype(trainer, self._forward),
            output=output,
            **self._engine_options,
        )
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            self._ready = Ready(trainer.strategy.model, self.mat, self._order)
        if isinstance(trainer.strategy, MATDDPStrategy):
            trainer.strategy.follow(self.mat)
        if (check_units := getattr(self.policy, "check_units", None)) is not None:
            check_units(self.mat.table())
        self.schedule.check_warmup(self.policy)
        trainer.strategy.optimizers = list(self.mat.optimizers)
        self._restore()
        rank_zero_info(f"MAT trains these units adaptively:\n{self.mat.part.describe()}")
        if frozen := self.mat.part.frozen:
            rank_zero_info(
                f"MAT: {len(frozen)} parameters are frozen (first {frozen[0]!r}): they belong to "
                "no unit and stay as they are"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the data, and take up a restored run's decision."""
        mat = self._mat()
        self._restore()
        mat.check_ranks()
        mat.apply()
        if self.policy.needs_spectra:
            mat.prepare(self._samples_for_probe(trainer))
        self._keeper = Keeper(run_folder(trainer), keep_eigenvalues=self.keep_eigenvalues)
        if trainer.is_global_zero:
            self._keeper.begin(trainer.global_step, len(mat.history))

    def on_train_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Begin an episode where one is due; count the FLOPs of its first step."""
        if self.schedule.ready(self.should_probe(trainer, batch_idx)):
            # A signal or an error may have a checkpoint saved while the episode is half begun.
            self._undecided = self._before_episode()
            self._begin_episode(trainer, pl_module, batch)
            self._undecided = None
        self._step_before = trainer.global_step
        self._ledger.begin()

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """Let DDP know which parameters will get no gradient."""
        if not loss.requires_grad and not self._mat().active.any():
            raise RuntimeError(
                "no unit trains in this episode, and the loss depends on nothing else that does: "
                "keep a unit of each layer training (protect=True), or let the policy choose more"
            )
        self._ledger.backward()
        if self._ready is not None:
            self._ready.before_backward(loss)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drop DDP's zeros of what rests; let a gradient scaler find one in every optimizer."""
        if self._ready is not None:
            self._ready.after_backward()
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            for optimizer in self._mat().optimizers:
                optimizer.ensure_gradient()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Account for the step."""
        if not self._ledger.running:
            return  # of a batch that is None, Lightning begins nothing
        self.schedule.end_batch(stepped=trainer.global_step != self._step_before)
        mat = self._mat()
        samples = samples_of(batch)
        share = float(mat.active.double().mean())
        if self._ledger.end(samples, mat.active):
            per_sample = self._ledger.flops_per_sample
            if share == 1 or mat.full_cost == 0:
                mat.full_extent = Extent.of(batch)
                mat.full_cost = per_sample + float(mat.table().cost[~mat.active].sum())
            counted = {
                "step_flops": per_sample * samples,
                "full_step_flops": mat.full_cost * samples,
            }
            log_metrics(trainer, counted, max(self.schedule.decided_at, 0))
        pl_module.log("trained", share, prog_bar=True, logger=False, batch_size=samples)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count nothing of a batch that the module left out when it had begun."""
        self._ledger.close()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Likewise."""
        self._ledger.close()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if the calendar never came to a probe."""
        mat = self._mat()
        if trainer.is_global_zero and mat.episode == 0 and mat.probes == 0:
            said = self.schedule.never(trainer.current_epoch, trainer.global_step)
            warnings.warn(said, stacklevel=2)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Leave an ordinary model behind, whatever happened."""
        self._close(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave an ordinary model behind.

        The optimizers stay wrapped, with everything training, so that a checkpoint saved after the
        fit still knows how many steps each unit has made.
        """
        if stage == "fit":
            self._close(trainer)

    # ---- state -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain types; loads under ``torch.load(weights_only=True)``.

        While an episode begins, it is the state before: a run resumed from it begins the episode.
        """
        if self._undecided is not None and not self._steps_alone:
            return self._undecided
        if self.mat is None or self._restored is not None or self._is_of_last_fit:
            return self._loaded
        state: dict[str, Any] = {
            "mat": self.mat.state_dict(),
            "schedule": self.schedule.state_dict(),
            "ledger": self._ledger.state_dict(),
            "order": list(self._order),
        }
        for part, before in (self._undecided or {}).items():
            state[part] |= before
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a saved run's state until its training starts.

        A checkpoint that is only tested or validated after a fit changes nothing of the fit's.
        """
        if self.mat is not None and self._stage not in ("", "fit"):
            return
        self._loaded = state_dict
        if not state_dict:
            return
        self._restored = state_dict["mat"]
        # Earlier checkpoints have the schedule's entries at the top.
        self.schedule.load_state_dict(state_dict.get("schedule", state_dict))
        self._ledger.load_state_dict(state_dict["ledger"])
        self._order = list(state_dict.get("order", ()))

    def summary(self) -> dict[str, float | int]:
        """Return what the run has cost so far.

        Returns:
            ``flops``: counted, of the training steps and the probes. ``probe_flops``: of the
            probes, with the look at the model before the first. ``probe_seconds`` and ``seconds``:
            wall clock, of the same, and of the training batches and the probes.
            ``trained_share``: mean share of the units that trained, over the batches.
            ``full_step_flops``: per sample, with everything training, as counted in the warm-up;
            without one, the first step's plus the weight gradients of what rested in it, which is a
            lower bound.
            ``probes``: how many. ``skipped_probes``: how many could not be measured.
        """
        return run_summary(self._mat(), self._ledger)

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

    def _begin_episode(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
    ) -> None:
        mat = self._mat()
        before, probes, skipped = mat.decision, mat.probes, mat.skipped
        spent = mat.probe_seconds
        mat.probe.step_samples = samples_of(batch)
        samples = None
        if self.policy.needs_spectra:
            try:
                samples = self._samples_for_probe(trainer)
            except Exception as error:
                mat.skip(error, step=trainer.global_step)
        if mat.skipped == skipped:
            mat.update(samples, step=trainer.global_step, epoch=trainer.current_epoch)
        decision = mat.decision
        self.schedule.decided(trainer.global_step)
        if mat.skipped > skipped:
            return
        if not torch.equal(before.active, decision.active):
            self._ledger.switch(mat.active)
        if (in_full := mat.gate.in_full) and not self._said_in_full:
            self._said_in_full = True
            rank_zero_info(
                f"MAT: parts of {len(in_full)} parameters (first {in_full[0]!r}) rest in layers "
                "that no gate rule knows: their gradients are computed in full and cleared there "
                "(register_gate_rule adds a rule)"
            )
        if self._steps_alone and mat.episode > 1:
            return  # the first of such episodes is logged, or there would be a row per step
        seconds = mat.probe_seconds - spent
        log_metrics(trainer, episode_metrics(mat, seconds), trainer.global_step)
        measured = mat.probes > probes and decision is not before
        if measured and mat.spectra is not None and trainer.is_global_zero:
            step, epoch = trainer.global_step, trainer.current_epoch
            self._keeper.append(Probe(mat.spectra, decision, mat.table(), step, epoch, seconds))
        for line in decision.summary().splitlines():
            rank_zero_info(f"MAT at step {trainer.global_step}: {line}")

    def _before_episode(self) -> dict[str, Any]:
        """Return the state that an episode's beginning changes: all, or what single steps can."""
        if not self._steps_alone:
            return self.state_dict()
        mat = self._mat()
        decision = {"decision": mat.decision.state_dict(), "episode": mat.episode}
        return {"mat": decision, "schedule": self.schedule.state_dict()}

    def _samples_for_probe(self, trainer: pl.Trainer) -> Any:
        """Return a batch from the training set, on the device, as a training step would get it."""
        mat = self._mat()
        data = trainer.train_dataloader if self.probe_data is None else self.probe_data
        number = mat.probes + mat.skipped  # samples that cannot be read are not drawn again
        return probe_batch(trainer, data, self.n_samples, self.seed, number, mat.ranks)

    def _close(self, trainer: pl.Trainer) -> None:
        self._ledger.close()
        if self._ready is not None:
            self._ready.close()
            self._ready = None
        if isinstance(trainer.strategy, MATDDPStrategy):
            trainer.strategy.follow(None)
        if self.mat is not None:
            self.mat.close()
