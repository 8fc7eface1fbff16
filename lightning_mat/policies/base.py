"""UnitTable, Decision and Policy: what a policy sees, what it returns, what it is."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_mat.policies.history import History

# Reasons a unit trains ...
INFORMATION = "{measure} ≥ λ_α"
PROTECTED = "protected"
IN_BUDGET = "budget"
DRAWN = "random"
FULL = "full"
RANKED = "ranked first"
FAST = "fast"
SLOW = "slow"
# ... and reasons it rests.
BELOW = "below λ_α"
TEMPORAL = "temporal"
OVER_BUDGET = "over budget"
NOT_DRAWN = "not drawn"
OUTRANKED = "outranked"
BETWEEN = "between slow steps"

# What thresholds are thresholds of, unless a decision says otherwise.
LAMBDA_MAX = "λ_max"

# In a decision's summary, in this order.
_LISTED = (BELOW, TEMPORAL, OVER_BUDGET, NOT_DRAWN, OUTRANKED, FAST, SLOW, BETWEEN, PROTECTED)


def compact(value: float) -> str:
    """Return a number in three digits, with a short exponent where it needs one.

    Example:
        >>> compact(100.0), compact(3.2e11), compact(0.00012345)
        ('100', '3.2e11', '0.000123')
    """
    mantissa, _, exponent = f"{value:.3g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


@dataclass(frozen=True, eq=False)
class UnitTable:
    """What a policy knows of the units besides their spectra.

    Args:
        names: Names of the units, length L, unique.
        kinds: Kind of each unit, length L.
        layers: Layer of each unit, length L.
        cost: FLOPs per sample that training each unit adds to a step, float64, shape ``[L]``.
        full_cost: FLOPs per sample of a training step with every unit, 0.0 if unknown.

    Raises:
        ValueError: If lengths differ, a name repeats, or a cost is negative or not finite.

    Example:
        >>> table = UnitTable(("a.0", "a.1"), ("head", "head"), ("a", "a"),
        ...                   torch.tensor([10.0, 30.0]), full_cost=100.0)
        >>> table.cost_share(torch.tensor([True, False]))
        0.7
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    layers: tuple[str, ...]
    cost: Tensor
    full_cost: float = 0.0

    def __post_init__(self) -> None:
        """Check lengths, names and costs; hold the costs in float64 on the CPU."""
        for field in ("names", "kinds", "layers"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        cost = self.cost.detach().to(device="cpu", dtype=torch.float64).clone()
        object.__setattr__(self, "cost", cost)
        lengths = {len(self.names), len(self.kinds), len(self.layers)}
        if len(lengths) > 1 or tuple(cost.shape) != (len(self.names),):
            raise ValueError(
                f"a unit table needs one entry per unit, got {len(self.names)} names, "
                f"{len(self.kinds)} kinds, {len(self.layers)} layers and costs of shape "
                f"{tuple(cost.shape)}"
            )
        if len(set(self.names)) < len(self.names):
            twice = next(n for n in self.names if self.names.count(n) > 1)
            raise ValueError(f"two units are named {twice!r}: unit names must be unique")
        if not (cost.isfinite() & (cost >= 0)).all():
            worst = int((~(cost.isfinite() & (cost >= 0))).nonzero()[0])
            raise ValueError(
                f"the cost of {self.names[worst]!r} is {cost[worst].item()}: "
                "costs are FLOPs per sample, finite and ≥ 0"
            )
        if not (math.isfinite(self.full_cost) and self.full_cost >= 0):
            raise ValueError(
                f"full_cost is {self.full_cost}: give FLOPs per sample of a full training step, "
                "or 0.0 if unknown"
            )

    def __len__(self) -> int:
        """Return the number of units, L."""
        return len(self.names)

    def by_kind(self) -> dict[str, list[int]]:
        """Return the indices of the units of each kind, in order of first appearance."""
        groups: dict[str, list[int]] = {}
        for i, kind in enumerate(self.kinds):
            groups.setdefault(kind, []).append(i)
        return groups

    def by_layer_and_kind(self) -> dict[tuple[str, str], list[int]]:
        """Return the indices of the units of each (layer, kind), in order of first appearance."""
        groups: dict[tuple[str, str], list[int]] = {}
        for i, key in enumerate(zip(self.layers, self.kinds, strict=True)):
            groups.setdefault(key, []).append(i)
        return groups

    def cost_share(self, active: Tensor) -> float:
        """Return the cost of a step in which ``active`` units train, as a share of a full step.

        Args:
            active: bool, shape ``[L]``.

        Raises:
            ValueError: If the cost of a full step is unknown.
        """
        if self.full_cost == 0:
            raise ValueError(
                "the cost of a full step is unknown (full_cost is 0.0): count the FLOPs of one "
                "full training step per sample first"
            )
        resting = math.fsum(self.cost[~active].tolist())
        return (self.full_cost - resting) / self.full_cost


@dataclass(frozen=True, eq=False)
class Decision:
    """Which units train in the next episode, and why.

    Args:
        active: Whether each unit trains, bool, shape ``[L]``.
        reasons: Why it trains or rests, length L.
        thresholds: λ_α of each kind, where the policy has one.
        kinds: Kind of each unit, length L.
        rates: Factor of the learning rate of each unit that trains, positive, float64, shape
            ``[L]``; None where all are 1.
        measure: What the thresholds are thresholds of.

    Raises:
        ValueError: If ``active`` is not a bool vector, lengths differ, or a rate is not positive
            and finite.

    Example:
        >>> decision = Decision(torch.tensor([True, False, False]),
        ...                     ("λ_max ≥ λ_α", "below λ_α", "temporal"),
        ...                     {"head": 3.2e11}, ("head",) * 3)
        >>> print(decision.summary())
        head: 1 of 3 train, λ_α = 3.2e11 (1 below λ_α, 1 temporal)
    """

    active: Tensor
    reasons: tuple[str, ...]
    thresholds: Mapping[str, float]
    kinds: tuple[str, ...]
    rates: Tensor | None = None
    measure: str = LAMBDA_MAX

    def __post_init__(self) -> None:
        """Check lengths and rates; hold a copy of what was given."""
        if self.active.dtype != torch.bool or self.active.ndim != 1:
            raise ValueError(
                f"active must be a bool vector, got {self.active.dtype} of shape "
                f"{tuple(self.active.shape)}"
            )
        object.__setattr__(self, "active", self.active.detach().cpu().clone())
        object.__setattr__(self, "reasons", tuple(self.reasons))
        object.__setattr__(self, "kinds", tuple(self.kinds))
        object.__setattr__(self, "thresholds", {k: float(v) for k, v in self.thresholds.items()})
        if not len(self.active) == len(self.reasons) == len(self.kinds):
            raise ValueError(
                f"a decision needs one entry per unit, got {len(self.active)} flags, "
                f"{len(self.reasons)} reasons and {len(self.kinds)} kinds"
            )
        if self.rates is not None:
            rates = self.rates.detach().to(device="cpu", dtype=torch.float64).clone()
            if rates.shape != self.active.shape or not (rates.isfinite() & (rates > 0)).all():
                raise ValueError(
                    f"rates must hold a positive, finite factor for each of the {len(self)} units, "
                    f"got {rates.tolist()[:4]} of shape {tuple(rates.shape)}: a unit that should "
                    "not move rests (active is False)"
                )
            object.__setattr__(self, "rates", rates)

    def __len__(self) -> int:
        """Return the number of units, L."""
        return len(self.reasons)

    def trains_like(self, other: Decision) -> bool:
        """Return whether the same units train, at the same rates, whatever the reasons."""
        if not torch.equal(self.active, other.active):
            return False
        if self.rates is None or other.rates is None:
            return self.rates is other.rates
        return torch.equal(self.rates, other.rates)

    def trained_share(self) -> float:
        """Return the share of units that train, in [0, 1]; 1.0 without units."""
        return int(self.active.sum()) / len(self) if len(self) else 1.0

    def by_kind(self) -> dict[str, tuple[int, int]]:
        """Return (units that train, units) of each kind, in order of first appearance."""
        counts: dict[str, tuple[int, int]] = {}
        for kind, trains in zip(self.kinds, self.active.tolist(), strict=True):
            trained, total = counts.get(kind, (0, 0))
            counts[kind] = (trained + trains, total + 1)
        return counts

    def count(self, reason: str, kind: str | None = None) -> int:
        """Return how many units (of ``kind``, if given) have the reason."""
        pairs = zip(self.reasons, self.kinds, strict=True)
        return sum(r == reason and kind in (None, k) for r, k in pairs)

    def summary(self) -> str:
        """Return one line per kind: units that train, λ_α, and who rests or is kept for what."""
        lines = []
        for kind, (trained, total) in self.by_kind().items():
            line = f"{kind}: {trained} of {total} train"
            if kind in self.thresholds:
                line += f", λ_α = {compact(self.thresholds[kind])}"
                line += "" if self.measure == LAMBDA_MAX else f" ({self.measure})"
            tallies = [f"{self.count(r, kind)} {r}" for r in _LISTED if self.count(r, kind)]
            line += f" ({', '.join(tallies)})" if tallies else ""
            if self.rates is not None:
                trains = [k == kind for k in self.kinds] & self.active.numpy()
                fastest = float(self.rates[trains].max()) if trains.any() else 1.0
                line += "" if fastest == 1 else f", at up to {compact(fastest)} × the learning rate"
            lines.append(line)
        return "\n".join(lines)

    def digest(self) -> str:
        """Return a short string that is the same in every process if and only if decisions are."""
        parts = [
            "".join("01"[trains] for trains in self.active.tolist()),
            *self.reasons,
            *self.kinds,
            *(f"{kind}={self.thresholds[kind].hex()}" for kind in sorted(self.thresholds)),
        ]
        if self.measure != LAMBDA_MAX:
            parts.append(f"measure {self.measure}")
        if self.rates is not None:
            parts += [rate.hex() for rate in self.rates.tolist()]
        return hashlib.sha256("\x00".join(parts).encode()).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        """Return whether the other decision has the same units, reasons, thresholds and rates."""
        return isinstance(other, Decision) and self.digest() == other.digest()

    def __hash__(self) -> int:
        """Return an integer that is the same in every process."""
        return int(self.digest(), 16)

    def state_dict(self) -> dict[str, Any]:
        """Return a tensor and plain types; loads under ``torch.load(weights_only=True)``."""
        return {
            "active": self.active.clone(),
            "reasons": list(self.reasons),
            "thresholds": dict(self.thresholds),
            "kinds": list(self.kinds),
            "rates": None if self.rates is None else self.rates.clone(),
            "measure": self.measure,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Decision:
        """Return the decision that :meth:`state_dict` described, in this or an earlier version."""
        return cls(
            state["active"],
            state["reasons"],
            state["thresholds"],
            state["kinds"],
            state.get("rates"),
            state.get("measure", LAMBDA_MAX),
        )


@runtime_checkable
class Policy(Protocol):
    """Who trains next: a pure, picklable function of the history.

    The same history, units and episode give the same decision, in every process and after every
    resume: a policy keeps no state of its own and draws from no shared random stream.

    A policy may have more, which counts as absent where it is not there:

    - ``every_n_steps``, a whole number: the optimizer steps per episode of a policy that only makes
      sense on this calendar; :class:`~lightning_mat.MATCallback` follows it.
    - ``needs_alignment``, a bool: whether probes must measure ``Spectra.alignment``, which exists
      for ``output="loss"``.
    - ``budget``, a number or None: with one, the cost of a full step must be known.
    - ``check_units(units)``, which raises a ValueError where the policy does not fit the units of a
      run; called once, at its start.
    """

    @property
    def needs_spectra(self) -> bool:
        """Whether a probe must come before each decision."""

    def decide(self, history: History, units: UnitTable, episode: int) -> Decision:
        """Return which units train in the episode.

        Args:
            history: The probes so far, the newest last.
            units: Names, kinds, layers and costs of the L units.
            episode: 0 for the episode after the first probe.
        """
