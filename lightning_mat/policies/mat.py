"""MAT: modular and temporal policy, algorithm 1."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from difflib import get_close_matches
from numbers import Real
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from lightning_mat.policies.advice import Rules, warn_about_budget, warn_about_extremes
from lightning_mat.policies.base import (
    BELOW,
    IN_BUDGET,
    INFORMATION,
    OVER_BUDGET,
    PROTECTED,
    TEMPORAL,
    Decision,
    UnitTable,
)
from lightning_mat.policies.budget import within_budget
from lightning_mat.policies.criteria import (
    check_criterion,
    criterion_floors,
    criterion_label,
    criterion_values,
)
from lightning_mat.policies.history import History
from lightning_mat.policies.protect import protected, strongest
from lightning_mat.policies.temporal import settled
from lightning_mat.policies.threshold import (
    AUTO,
    default_alpha,
    eigenvalue_threshold,
    gap_threshold,
)

Alpha: TypeAlias = float | str


@dataclass(frozen=True)
class MAT:
    r"""Train the units whose mNTK still has a large, moving principal eigenvalue.

    After probe t (t = 0 the first one), within each kind, a unit is nuisance and rests if

    - modular policy: :math:`\lambda_{\max}(t) < \lambda_\alpha =
      \tilde\lambda_{\min} + (\tilde\lambda_{\max} - \tilde\lambda_{\min})\,\alpha`, with the
      extremes over all eigenvalues of all mNTKs of the kind at this probe (equations 4 and 5); or
    - temporal policy: t ≥ 2 and :math:`|\Delta_t - \Delta_{t-1}| < \beta\,\Delta_1`, with
      :math:`\Delta_t = |\lambda_{\max}(t) - \lambda_{\max}(0)|` (equation 6, multiplied by its
      denominator; at t = 1 its left side is 1 by definition and says nothing).

    All others are information and train. Both are taken anew after every probe, as algorithm 1
    does: a resting unit is probed too, and may wake. The protecting rule comes last. The decision
    of an empty set of information units, where algorithm 1 would end (possible with
    ``protect=False``), is returned as it is.

    A reason is given per unit. One that both policies rest is listed as ``below λ_α``.

    With another criterion than the paper's, its values stand in the place of λ_max in both
    policies, in protection and in the budget, and λ̃_min is the smallest of what smallest
    eigenvalues have of it (:mod:`~lightning_mat.policies.criteria`). Criteria differ in range
    (coherence is in [1/S, 1]): an α that was chosen for one says little about another.

    Args:
        alpha: α in (0, 1), or ``"auto"`` for the widest gap between the kind's log λ_max
            (:func:`~lightning_mat.policies.threshold.gap_threshold`), or a mapping from every kind
            to either. By default 0.1, and ``"auto"`` for filters
            (:func:`~lightning_mat.policies.threshold.default_alpha`).
        beta: β ≥ 0, or a mapping from every kind to it. 0 switches the temporal policy off.
        permanent: A unit that the temporal policy once rested is rested by it ever after.
        protect: Of each (layer, kind), at least the unit with the largest λ_max trains.
        budget: Share of a full step's FLOPs, in (0, 1]. If given, it replaces both policies (alpha,
            beta and permanent are not used): the units with the most λ_max per FLOP train, as far
            as the budget goes, protected ones first
            (:func:`~lightning_mat.policies.budget.within_budget`).
        criterion: What units are compared by: ``"lambda_max"``, ``"coherence"`` or
            ``"trainability"``, which needs probes with ``output="loss"``.
        per_flop: Compare the criterion per FLOP that training the unit costs. Units that cost
            nothing place no threshold, and are above it unless their criterion is 0. Not with a
            budget, which always compares so.

    Raises:
        ValueError: If a value is outside its range, or a budget comes with ``per_flop=True``.

    Warns:
        UserWarning: When α rests none of a kind's units, both policies together rest all of them,
            protection lets none of them rest, or the protected units alone exceed the budget; at
            the first probe of which that is true, not again while it stays so.

    Source:
        Shi et al., "Train Faster, Perform Better: Modular Adaptive Training in Over-Parameterized
        Models" (NeurIPS 2023), equations 4, 5 and 6, algorithm 1; protection in appendix B.1.

    Example:
        >>> from lightning_mat.mntk.spectra import Spectra
        >>> history = History()
        >>> history.append(Spectra(("a", "b"), torch.tensor([[100.0, 0.0], [8.0, 0.0]]),
        ...                        torch.zeros(2)), step=0, epoch=0)
        >>> table = UnitTable(("a", "b"), ("head", "head"), ("x", "x"), torch.zeros(2))
        >>> print(MAT(alpha=0.1).decide(history, table, 0).summary())
        head: 1 of 2 train, λ_α = 10 (1 below λ_α)
    """

    alpha: Alpha | Mapping[str, Alpha] | None = None
    beta: float | Mapping[str, float] = 1e-3
    _: KW_ONLY
    permanent: bool = False
    protect: bool = True
    budget: float | None = None
    criterion: str = "lambda_max"
    per_flop: bool = False

    needs_spectra: ClassVar[bool] = True

    @property
    def needs_alignment(self) -> bool:
        """Whether probes must measure the alignment with the loss gradient."""
        return self.criterion == "trainability"

    def __post_init__(self) -> None:
        """Check every value; hold copies of the mappings."""
        for field in ("alpha", "beta"):
            given = getattr(self, field)
            check = _check_alpha if field == "alpha" else _check_beta
            if isinstance(given, Mapping):
                object.__setattr__(self, field, dict(given))
                for kind, value in given.items():
                    check(value, f" of kind {kind!r}")
            elif field == "beta" or given is not None:
                check(given, "")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise ValueError(
                f"budget must be in (0, 1], got {self.budget}: it is the share of a full training "
                "step's FLOPs, e.g. 0.8"
            )
        check_criterion(self.criterion)
        if self.budget is not None and self.per_flop:
            raise ValueError(
                f"budget={self.budget} compares units per FLOP in any case: leave per_flop out"
            )

    def check_units(self, units: UnitTable) -> None:
        """Check that the policy fits the units; see :meth:`check_kinds`."""
        self.check_kinds(units.kinds)

    def check_kinds(self, kinds: Iterable[str]) -> None:
        """Check that the mappings of alpha and beta name exactly the kinds there are.

        Args:
            kinds: Kinds of the units; repetitions do not matter.

        Raises:
            ValueError: If a mapping names another kind, or leaves one out.
        """
        known = sorted(set(kinds))
        for field in ("alpha", "beta"):
            given = getattr(self, field)
            if not isinstance(given, Mapping):
                continue
            for kind in given:
                if kind not in known:
                    close = get_close_matches(str(kind), known, n=1)
                    raise ValueError(
                        f"{field} names the kind {kind!r}, but the units are of kind "
                        f"{', '.join(known)}: give a value for those only"
                        + (f" (did you mean {close[0]!r}?)" if close else "")
                    )
            for kind in known:
                if kind not in given:
                    raise ValueError(
                        f"{field} has no value for kind {kind!r}: add one, or give one number "
                        "for all kinds"
                    )

    def decide(self, history: History, units: UnitTable, episode: int) -> Decision:
        """Return which units train after the newest probe of the history.

        Args:
            history: At least one probe; t counts them, so that a probe that failed and was left
                out counts for nothing.
            units: The L units; ``cost`` and ``full_cost`` matter with a budget only.
            episode: Not used: the history says how far the run is.

        Raises:
            ValueError: If the history is empty, of other units, or its newest probe holds NaN or
                Inf; if a mapping does not fit the units' kinds; or if there is a budget and the
                cost of a full step is unknown.
        """
        self.check_kinds(units.kinds)
        history.check_against(units.names)
        values = criterion_values(history, units, self.criterion, self.per_flop)
        if self.budget is not None:
            return self._spend(values, units, self.budget)
        floors = criterion_floors(history, units, self.criterion, self.per_flop)
        rules = self._rules(values, floors, units)
        before = self._rules(values[:-1], floors[:-1], units) if len(history) > 1 else None
        warn_about_extremes(rules, before, units, self.protect)
        active = ~(rules.below | rules.settled)
        wake = torch.zeros_like(active)
        if self.protect:
            wake = protected(active, values[-1], units)
        above = INFORMATION.format(measure=rules.measure)
        rows = zip(wake.tolist(), rules.below.tolist(), rules.settled.tolist(), strict=True)
        reasons = tuple(
            PROTECTED if kept else BELOW if small else TEMPORAL if still else above
            for kept, small, still in rows
        )
        return Decision(
            active | wake, reasons, rules.thresholds, units.kinds, measure=rules.measure
        )

    def _rules(self, values: Tensor, floors: Tensor, units: UnitTable) -> Rules:
        """Return what both policies say of each unit after the last probe, before protection.

        Args:
            values: The criterion at the probes, shape ``[P, L]``.
            floors: That of the smallest eigenvalues, shape ``[P, L]``.
            units: The L units.
        """
        below = torch.zeros(len(units), dtype=torch.bool)
        still = torch.zeros(len(units), dtype=torch.bool)
        thresholds, automatic = {}, []
        for kind, members in units.by_kind().items():
            alpha = self._alpha_of(kind)
            beta = self.beta[kind] if isinstance(self.beta, Mapping) else self.beta
            series, newest = values[:, members], values[-1, members]
            # Units that cost nothing have Inf per FLOP: they place no threshold.
            counted = newest.isfinite()
            largest = newest[counted].tolist()
            smallest = floors[-1, members][counted].tolist()
            if isinstance(alpha, str):
                automatic.append(kind)
            if not largest:
                thresholds[kind] = 0.0
            elif isinstance(alpha, str):
                thresholds[kind] = gap_threshold(largest)
            else:
                thresholds[kind] = eigenvalue_threshold(largest, smallest, alpha)
            below[members] = newest < thresholds[kind]
            still[members] = settled(series, beta, permanent=self.permanent)
        label = criterion_label(self.criterion, self.per_flop)
        return Rules(below, still, thresholds, label, tuple(automatic))

    def _alpha_of(self, kind: str) -> Alpha:
        if self.alpha is None:
            return default_alpha(kind)
        return self.alpha[kind] if isinstance(self.alpha, Mapping) else self.alpha

    def _spend(self, values: Tensor, units: UnitTable, budget: float) -> Decision:
        """Return the decision under a budget."""
        first = self._kept(values[-1], units)
        active = within_budget(values[-1], units, budget, first)
        least = units.cost_share(first)
        kept_before = self._kept(values[-2], units) if len(values) > 1 else None
        if least > budget and (kept_before is None or units.cost_share(kept_before) <= budget):
            warn_about_budget(least, budget, self.protect)
        reasons = tuple(
            PROTECTED if kept else IN_BUDGET if trains else OVER_BUDGET
            for kept, trains in zip(first.tolist(), active.tolist(), strict=True)
        )
        return Decision(active, reasons, {}, units.kinds)

    def _kept(self, values: Tensor, units: UnitTable) -> Tensor:
        """Return the units that train under any budget, bool, shape [L]."""
        if self.protect:
            return strongest(values, units)
        return torch.zeros(len(units), dtype=torch.bool)


def _check_alpha(alpha: object, of_kind: str) -> None:
    """Raise unless alpha is "auto" or a number in (0, 1)."""
    number = isinstance(alpha, Real) and 0 < float(alpha) < 1
    if not number and alpha != AUTO:
        raise ValueError(
            f'alpha{of_kind} must be in (0, 1) or "auto", got {alpha!r}: it places the threshold '
            "between the smallest and the largest eigenvalue, e.g. 0.1"
        )


def _check_beta(beta: object, of_kind: str) -> None:
    """Raise unless beta is a finite number ≥ 0."""
    if not (isinstance(beta, Real) and math.isfinite(beta) and float(beta) >= 0):
        raise ValueError(
            f"beta{of_kind} must be a finite number ≥ 0, got {beta!r}: it is the relative change "
            "of λ_max below which a unit rests, e.g. 1e-3; 0 switches the temporal policy off"
        )
