"""MAT: probe → decide → gate and optimizers; knows no Lightning."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_mat.faults import (
    PeerError,
    check_survivable,
    decide_measured,
    nothing_to_decide,
)
from lightning_mat.gate import Gate
from lightning_mat.ledger import ProbeLedger
from lightning_mat.mapping import (
    check_partition_change,
    mapped_decision,
    marks_of,
    recut,
    unit_diff,
)
from lightning_mat.mntk.extent import Extent
from lightning_mat.mntk.memory import ProbeMemoryError
from lightning_mat.mntk.outputs import Forward, Output
from lightning_mat.mntk.probe import Probe
from lightning_mat.mntk.spectra import Spectra
from lightning_mat.optim import MATOptimizer
from lightning_mat.parallel.probing import SharedProbe
from lightning_mat.parallel.ranks import Ranks
from lightning_mat.policies import MAT as MATPolicy
from lightning_mat.policies import Decision, History, Policy, UnitTable
from lightning_mat.policies.base import FULL
from lightning_mat.policies.check import check_decision, check_policy
from lightning_mat.shards import check_shards
from lightning_mat.units import Partition, partition

log = logging.getLogger(__name__)


class MAT:
    """Modular adaptive training of one model, for any training loop.

    Args:
        model: The model.
        optimizers: Its optimizer or optimizers; wrapped, see :attr:`optimizers`.
        units: A :class:`Partition`, or what :func:`lightning_mat.partition` takes.
        policy: Who trains next; the paper's by default.
        skip: What the backward pass skips, see :class:`lightning_mat.Gate`: ``"weights"`` or
            ``"units"``.
        output: The scalar per sample that is differentiated, see :func:`lightning_mat.mntk`.
        forward: ``(model, batch) -> logits``, see :func:`lightning_mat.mntk`.
        precision: Of the probe.
        memory: Bytes that a probe may take above the model, or ``"auto"``.
        backend: Of the probe's operations.
        step_samples: Samples of a training step on this device, for ``memory="auto"``.
        dry_run: Measure and decide, but let everything train.
        seed: Of ``output="random"``.
        waking: What becomes of the optimizers' state of a unit that wakes: ``"keep"``, ``"reset"``
            or ``"decay"``, see :class:`lightning_mat.MATOptimizer`.
        freeze_bn: Whether BatchNorm's running statistics of resting filters stop, see
            :class:`lightning_mat.Gate`.
        ranks: The processes that train copies or shards of the model together, see
            :class:`lightning_mat.parallel.Ranks`; None for one process. All call :meth:`update`
            with the same samples; rank 0 decides. Where DDP wraps the model, backward passes need
            :class:`lightning_mat.parallel.Ready`.
        on_partition_change: What :meth:`load_state_dict` does with a state of other units:
            ``"refuse"`` it, or ``"map"`` it by their names.

    Parameters that are frozen (``requires_grad=False``) when the units are found belong to none and
    stay frozen; nothing here ever sets ``requires_grad``. Unfrozen later, they always train.

    Attributes:
        part: The partition.
        optimizers: The wrapped optimizers, in the order given; step these.
        history: Scalars of all probes so far.
        decision: Who trains now.
        spectra: The newest probe, or None.
        probes: How many probes were measured.
        skipped: How many could not be, see :meth:`skip`.
        full_cost: FLOPs per sample of a step in which everything trains, for policies with a
            budget: set it to what :func:`lightning_mat.flops.count` counts in one such step, over
            its samples.
        full_extent: How large the samples of that step were, padding and all: units' costs, which
            are a probe's, are taken for samples as large. Without it, as large as the probe's.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
        >>> mat = MAT(model, torch.optim.SGD(model.parameters(), 0.1), units="layers")
        >>> _ = mat.update(torch.randn(16, 4), step=0)
        >>> optimizer = mat.optimizers[0]
        >>> loss = model(torch.randn(5, 4)).square().mean()
        >>> loss.backward()
        >>> _ = optimizer.step()
        >>> mat.close()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Optimizer | Iterable[Optimizer] = (),
        units: Any = "auto",
        policy: Policy | None = None,
        *,
        skip: str = "weights",
        output: Output = "sum_logits",
        forward: Forward | None = None,
        precision: str = "float32",
        memory: str | int = "auto",
        backend: str = "auto",
        step_samples: int | None = None,
        dry_run: bool = False,
        seed: int = 0,
        waking: str = "keep",
        freeze_bn: bool = False,
        ranks: Ranks | None = None,
        on_partition_change: str = "refuse",
    ) -> None:
        check_partition_change(on_partition_change)
        if policy is not None:
            check_policy(policy)
        if optimizers is None:
            raise TypeError(
                "optimizers must be an optimizer or several, got None: leave it out for a model "
                "that is only measured and gated"
            )
        self.on_partition_change = on_partition_change
        self.model = model
        self.ranks = ranks
        self._first = ranks is None or ranks.rank == 0
        self._sharded = check_shards(model, 0 if ranks is None else ranks.size)
        self.part = units if isinstance(units, Partition) else partition(model, units)
        self.policy = MATPolicy() if policy is None else policy
        self.dry_run = dry_run
        settings: dict[str, Any] = {
            "output": output,
            "forward": forward,
            "precision": precision,
            "memory": memory,
            "backend": backend,
            "step_samples": step_samples,
            "seed": seed,
            "alignment": bool(getattr(self.policy, "needs_alignment", False)),
        }
        self.probe: Probe | SharedProbe
        if ranks is None:
            self.probe = Probe(model, self.part, **settings)
        else:
            self.probe = SharedProbe(model, self.part, ranks, **settings)
        # Before the optimizers are wrapped: it may refuse.
        self.gate = Gate(model, self.part, skip=skip, freeze_bn=freeze_bn)
        given = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
        self.optimizers: list[MATOptimizer] = []
        try:
            for inner in given:
                wrapped = MATOptimizer(inner, model, self.part, waking, on_partition_change)
                self.optimizers.append(wrapped)
        except BaseException:
            for wrapped in self.optimizers:
                wrapped.unwrap()
            raise
        self.history = History()
        self.spectra: Spectra | None = None
        self.decision = self._everything()
        self._applied: Decision | None = None
        self._slices = marks_of(self.part)
        self.full_cost = 0.0
        self.full_extent = self._probe_extent = Extent()
        self._cost = torch.zeros(len(self.part), dtype=torch.float64)
        self.episode = 0
        self.probes = 0
        self.skipped = 0
        self._costs = ProbeLedger(ranks)

    @property
    def active(self) -> torch.Tensor:
        """Which units train now, bool, shape ``[L]``; all of them in a dry run."""
        if self.dry_run:
            return torch.ones(len(self.part), dtype=torch.bool)
        return self.decision.active

    @property
    def rates(self) -> torch.Tensor | None:
        """Factor of each unit's learning rate, shape ``[L]``; None where all are 1."""
        return None if self.dry_run else self.decision.rates

    def update(self, batch: Any, *, step: int, epoch: int = 0) -> Decision:
        """Begin an episode: measure, decide, and let the gate and the optimizers follow.

        Call it between optimizer steps. Units whose spectrum is NaN or Inf stay as they are, and
        the others are decided without them; a probe of which nothing is left, of a kind or in all,
        or that does not fit the memory decides nothing. Each costs a warning, of several processes
        in the first and in the one that failed.

        Args:
            batch: Samples for the probe; ignored if the policy needs no spectra.
            step: Optimizer steps done so far.
            epoch: The current epoch.

        Returns:
            Who trains from now on.
        """
        if self.policy.needs_spectra:
            try:
                self.spectra = self.measure(batch)
                self._cost, self._probe_extent = self.spectra.cost, Extent.of(batch)
            except ProbeMemoryError as error:
                self.skip(error, step=step)
                return self.decision
            finite = self.spectra.finite
            keeps = nothing_to_decide(finite, self.part.kinds)
            if not finite.all() and self._first:
                failed = int((~finite).sum())
                first = self.part.names[int((~finite).nonzero()[0])]
                warnings.warn(
                    f"probe at step {step}: the spectra of {failed} of {len(self.part)} units "
                    f"(first {first!r}) are NaN or Inf; keeping "
                    f"{'the previous decision' if keeps else 'these units as they are'}. Look at "
                    "the loss and the learning rate",
                    stacklevel=2,
                )
            if keeps:
                return self.decision
            self.history.append(self.spectra, step, epoch, gaps=True)
        self.decision = self._decide()
        self.episode += 1
        # A policy that decides in every step mostly decides what holds already.
        if self._applied is None or not self._applied.trains_like(self.decision):
            self.apply()
        return self.decision

    def skip(self, error: BaseException, *, step: int) -> None:
        """Go on without a probe that could not be measured: the decision stays, with a warning.

        Args:
            error: What came in its way.
            step: Optimizer steps done so far.

        Raises:
            BaseException: The error itself, if it is a mistake in a program, or an interruption;
                see :mod:`lightning_mat.faults`.
        """
        check_survivable(error)
        self.skipped += 1
        if self._first or not isinstance(error, PeerError):
            warnings.warn(
                f"probe at step {step}: {type(error).__name__}: {error}; skipping this probe and "
                "keeping the previous decision",
                stacklevel=3,
            )

    def prepare(self, batch: Any) -> None:
        """Look at the model with a few samples, to find early what cannot be measured."""
        with self._costs.look(), self._ungated():
            self.probe.prepare(batch)

    def measure(self, batch: Any) -> Spectra:
        """Return the spectra over a batch of samples, and account for what that cost."""
        if self._costs.lacks_look:
            self.prepare(batch)
        # Several processes share out anew after the first probe, by what it counted.
        lasts = not isinstance(self.probe, SharedProbe) or self.probe.settled
        with self._costs.probe(lasts=lasts), self._ungated():
            spectra = self.probe.measure(batch)
        self.probes += 1
        return spectra

    @contextmanager
    def _ungated(self) -> Iterator[None]:
        self.gate.check_alone()
        self.gate.remove()
        try:
            yield
        finally:
            self.gate.apply(self.active)

    @property
    def probe_flops(self) -> int:
        """FLOPs of all probes, see :class:`lightning_mat.ledger.ProbeLedger`."""
        return self._costs.flops

    @property
    def probe_seconds(self) -> float:
        """Wall-clock seconds of all probes."""
        return self._costs.seconds

    def table(self) -> UnitTable:
        """Return what a policy may know of the units."""
        part = self.part
        cost = self._cost * self.gate.products * self.full_extent.over(self._probe_extent)
        return UnitTable(part.names, part.kinds, part.layers, cost, full_cost=self.full_cost)

    def apply(self) -> None:
        """Make the gate and the optimizers follow the decision."""
        self.gate.apply(self.active)
        rates = () if self.rates is None else (self.rates,)
        for optimizer in self.optimizers:
            optimizer.apply(self.active, *rates)
        self._applied = self.decision

    def close(self) -> None:
        """Remove the gate: the model is an ordinary one, in which everything trains."""
        self._applied = None
        self.gate.remove()
        everything = torch.ones(len(self.part), dtype=torch.bool)
        for optimizer in self.optimizers:
            optimizer.apply(everything)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain types; loads under ``torch.load(weights_only=True)``."""
        return {
            "units": list(self.part.names),
            "slices": self._slices,
            "history": self.history.state_dict(),
            "decision": self.decision.state_dict(),
            "full_cost": self.full_cost,
            "cost": self._cost,
            "extents": [[e.elements, *e.form] for e in (self.full_extent, self._probe_extent)],
            "episode": self.episode,
            "probes": self.probes,
            "skipped": self.skipped,
            **self._costs.state_dict(),
            "shared": self.probe.state_dict() if isinstance(self.probe, SharedProbe) else {},
            "optimizers": [o.state_beside() for o in self.optimizers] if self._sharded else [],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken, and apply its decision.

        The optimizers' own states are loaded by their own ``load_state_dict``, those of a sharded
        model before this.

        Of another partition's state, with ``on_partition_change="map"``, units go on with the
        history and the decision that go by their name. New ones train, and no probe so far has
        measured them; so do units of a known name that own other slices now. A warning lists all.
        States of earlier versions do not say what units own: names alone count there.

        Raises:
            ValueError: If the state is of another partition and not to be mapped; the message lists
                the units that differ.
        """
        history, decision = History(), Decision.from_state_dict(state["decision"])
        history.load_state_dict(state["history"])
        saved, names = list(state["units"]), self.part.names
        cut = recut(state, names, self._slices)
        others = saved != list(names) or bool(cut)
        if others:
            difference = unit_diff(saved, names, cut)
            if self.on_partition_change == "refuse":
                raise ValueError(
                    f"the saved state is of other units: {difference}. Resume with the model and "
                    'the units of the saved run, or pass on_partition_change="map" to keep what '
                    "is known of the units of the same name and slices"
                )
            warnings.warn(
                f"the saved state is of other units, and is mapped by their names: {difference}",
                stacklevel=2,
            )
            history = history.of(names, new=cut)
            decision = mapped_decision(decision, saved, self.part, new=cut)
        self.history, self.decision = history, decision
        self.full_cost = float(state["full_cost"])
        known = None if others else state.get("cost")
        self._cost = torch.zeros_like(self._cost) if known is None else known
        extents = [Extent(e[0], tuple(e[1:])) for e in state.get("extents", ())]
        self.full_extent, self._probe_extent = extents or [Extent()] * 2
        self.episode = int(state["episode"])
        self.probes = int(state["probes"])
        self.skipped = int(state.get("skipped", 0))
        self._costs.load_state_dict(state, others=others)
        if isinstance(self.probe, SharedProbe):
            self.probe.load_state_dict({} if others else state.get("shared", {}))
        beside = state.get("optimizers", ())
        if self._sharded and not beside and any(o.inner.state for o in self.optimizers):
            warnings.warn(
                "the saved state is of a run whose model was not sharded: step counts of slabs are "
                "not in what PyTorch loads of its optimizers, so that every slab goes on with the "
                "highest of its parameter",
                stacklevel=2,
            )
        for optimizer, held in zip(self.optimizers, beside, strict=False):
            optimizer.load_state_beside(held)
        self.spectra = None
        self.apply()

    def _decide(self) -> Decision:
        """Return the policy's decision; with several processes that of rank 0, checked on all.

        Costs may be counted differently where ranks see other samples, so rank 0 decides for all. A
        policy of single steps would wait for that in every step: it decides on each rank, which is
        checked at episodes 0, 1, 2, 4, 8, ...
        """
        if self.ranks is None:
            return self._own_decision()
        alone = getattr(self.policy, "every_n_steps", None) is not None
        if alone and not self.policy.needs_spectra:
            decision = self._own_decision()
            if self.episode & (self.episode - 1):
                return decision
        else:
            with self.ranks.together("the decision"):
                state = self._own_decision().state_dict() if self._first else None
            decision = Decision.from_state_dict(self.ranks.from_first(state))
        self.ranks.check_same("the decision", decision.digest())
        return decision

    def _own_decision(self) -> Decision:
        table = self.table()
        if self.policy.needs_spectra:
            return decide_measured(self.policy, self.history, table, self.episode, self.decision)
        decision = self.policy.decide(self.history, table, self.episode)
        return check_decision(decision, self.policy, table)

    def check_ranks(self) -> None:
        """Check that every rank goes on from the same state, for instance of a checkpoint.

        Raises:
            RuntimeError: If one does not; the message names it.
        """
        if self.ranks is not None:
            words = [self.decision.digest(), self.episode, len(self.history), *self.part.names]
            digest = hashlib.sha256("\x00".join(map(str, words)).encode()).hexdigest()[:16]
            self.ranks.check_same("the state", digest)

    def _everything(self) -> Decision:
        count = len(self.part)
        active = torch.ones(count, dtype=torch.bool)
        return Decision(active, (FULL,) * count, {}, self.part.kinds)
