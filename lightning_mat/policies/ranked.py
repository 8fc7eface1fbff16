"""Top and Bottom: a fixed share of the units, by rank."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from numbers import Real
from typing import Any, ClassVar

import torch

from lightning_mat.policies.base import OUTRANKED, PROTECTED, RANKED, Decision, Policy, UnitTable
from lightning_mat.policies.check import check_policy
from lightning_mat.policies.criteria import check_criterion, criterion_values
from lightning_mat.policies.history import History


@dataclass(frozen=True)
class Top:
    """Of each kind, the units with the largest criterion train, as many as a share says.

    Of equals, the first ones train. Under protection, the first of each (layer, kind) in the
    ranking is taken before all others, within the share as long as that is at least one per layer;
    so a share that was taken from a protecting policy is kept exactly.

    Args:
        fraction: Share of each kind's n units to train: a number in [0, 1], for ``round(fraction ·
            n)`` of them (Python's ``round``: halves go to the even number), or a policy, usually a
            :class:`~lightning_mat.policies.MAT`, for as many as it would train after the same
            probes.
        criterion: What units are ranked by, see :mod:`~lightning_mat.policies.criteria`.
        per_flop: Rank by the criterion per FLOP that training the unit costs.
        protect: Train at least one unit of each (layer, kind).

    Raises:
        ValueError: If the fraction is neither of the two, or the criterion is unknown.

    Example:
        >>> from lightning_mat.mntk.spectra import Spectra
        >>> history = History()
        >>> history.append(Spectra(("a", "b", "c"), torch.tensor([[3.0], [9.0], [5.0]]),
        ...                        torch.ones(3)), step=0, epoch=0)
        >>> table = UnitTable(("a", "b", "c"), ("head",) * 3, ("x",) * 3, torch.ones(3))
        >>> Top(2 / 3).decide(history, table, 0).active.tolist()
        [False, True, True]
    """

    fraction: float | Policy
    _: KW_ONLY
    criterion: str = "lambda_max"
    per_flop: bool = False
    protect: bool = True

    needs_spectra: ClassVar[bool] = True
    _largest_first: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the fraction and the criterion."""
        check_criterion(self.criterion)
        given = self.fraction
        if isinstance(given, type):
            check_policy(given)
        number = isinstance(given, Real) and 0 <= float(given) <= 1
        if not number and not isinstance(given, Policy):
            raise ValueError(
                f"fraction must be in [0, 1], or a policy, got {given!r}: it is the share of each "
                "kind's units that train, or says how many do"
            )

    @property
    def needs_alignment(self) -> bool:
        """Whether probes must measure the alignment with the loss gradient."""
        return self.criterion == "trainability" or bool(self._asked("needs_alignment"))

    @property
    def budget(self) -> float | None:
        """The budget of the policy that says how many units train, if it has one."""
        found: float | None = self._asked("budget")
        return found

    def check_units(self, units: UnitTable) -> None:
        """Check that the policy that says how many units train fits the units."""
        if check := self._asked("check_units"):
            check(units)

    def decide(self, history: History, units: UnitTable, episode: int) -> Decision:
        """Return the units that come first after the newest probe of the history.

        Args:
            history: At least one probe.
            units: The L units; ``cost`` matters with ``per_flop`` only.
            episode: Passed on to the policy that says how many units train.

        Raises:
            ValueError: If the history is empty, of other units, or its newest probe holds NaN or
                Inf, or the criterion cannot be computed.
        """
        history.check_against(units.names)
        values = criterion_values(history, units, self.criterion, self.per_flop)[-1].tolist()
        counts = self._counts(history, units, episode)
        first_of = units.by_layer_and_kind()
        active = torch.zeros(len(units), dtype=torch.bool)
        reasons = [OUTRANKED] * len(units)
        sign = -1 if self._largest_first else 1
        for kind, members in units.by_kind().items():
            ranked = sorted(members, key=lambda i: sign * values[i])
            chosen = first = set(ranked[: counts[kind]])
            if self.protect:
                groups = [group for (_, k), group in first_of.items() if k == kind]
                kept = {min(group, key=lambda i: sign * values[i]) for group in groups}
                others = [i for i in ranked if i not in kept]
                chosen = kept | set(others[: max(counts[kind] - len(kept), 0)])
            for i in chosen:
                active[i] = True
                reasons[i] = RANKED if i in first else PROTECTED
        return Decision(active, tuple(reasons), {}, units.kinds)

    def _counts(self, history: History, units: UnitTable, episode: int) -> dict[str, int]:
        """Return how many units of each kind the share is."""
        if isinstance(self.fraction, Policy):
            decision = self.fraction.decide(history, units, episode)
            return {kind: trained for kind, (trained, _) in decision.by_kind().items()}
        return {kind: round(self.fraction * len(m)) for kind, m in units.by_kind().items()}

    def _asked(self, name: str) -> Any:
        """Return what the policy that says how many units train has of this name, or None."""
        return getattr(self.fraction, name, None)


@dataclass(frozen=True)
class Bottom(Top):
    """Of each kind, the units with the smallest criterion train: the control for :class:`Top`.

    If they do as well as those with the largest, the criterion says nothing. Arguments are those of
    :class:`Top`; protection, too, takes the smallest of each (layer, kind).
    """

    _largest_first: ClassVar[bool] = False
