"""What a probe survives, and who is decided after a probe that measured only some units.

A probe is worth less than the run that it interrupts. So what can go wrong around a correct program
costs the probe and not the run: memory that runs out, a file that cannot be read, a sample that
cannot be decoded or collated. Mistakes in a program (a ``TypeError`` in a collate function, a
misspelt attribute) are raised, and so are interruptions, and whatever the model's own forward pass
raises, but for memory: a training step on those samples would fail alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_mat.mntk.memory import ProbeMemoryError
from lightning_mat.policies.base import Decision, Policy, UnitTable
from lightning_mat.policies.check import check_decision
from lightning_mat.policies.history import History

MISTAKES = (TypeError, AttributeError, NameError, AssertionError, ImportError, NotImplementedError)
"""Exceptions that say that a program is wrong."""


class PeerError(RuntimeError):
    """Another process failed; the message names it."""


class PeerMemoryError(PeerError, ProbeMemoryError):
    """Another process found no memory for a probe."""


class PeerMistakeError(PeerError):
    """Another process has one of :data:`MISTAKES`."""


def severity(error: BaseException) -> int:
    """Return 0 for memory that ran out, 1 for what drawing samples survives, 2 for all else."""
    if isinstance(error, ProbeMemoryError):
        return 0
    mistake = isinstance(error, (*MISTAKES, PeerMistakeError)) or not isinstance(error, Exception)
    return 2 if mistake else 1


def check_survivable(error: BaseException) -> None:
    """Raise the error again if a run cannot go on after it: a mistake, or an interruption."""
    if severity(error) == 2:
        raise error


def nothing_to_decide(finite: Tensor, kinds: Sequence[str]) -> bool:
    """Return whether a kind has no unit left to take a threshold from.

    Args:
        finite: Whether each unit was measured, bool, shape ``[L]``.
        kinds: Kind of each unit, length L.
    """
    measured = {kind for kind, ok in zip(kinds, finite.tolist(), strict=True) if ok}
    return measured != set(kinds)


def decide_measured(
    policy: Policy, history: History, units: UnitTable, episode: int, before: Decision
) -> Decision:
    """Return the decision about the units that the newest probe measured; others stay as they are.

    The policy sees the measured units alone: thresholds, ranks and protection are among them.

    Args:
        policy: Who trains next.
        history: At least one probe; NaN for units that one did not measure.
        units: The L units.
        episode: Of the decision.
        before: The decision so far.

    Raises:
        TypeError: If the policy returns no decision.
        ValueError: If it returns one about other units.
    """
    measured = ~history.lambda_max[-1].isnan()
    if measured.all():
        return check_decision(policy.decide(history, units, episode), policy, units)
    chosen = measured.nonzero().flatten().tolist()
    names = [units.names[i] for i in chosen]
    some = UnitTable(
        tuple(names),
        tuple(units.kinds[i] for i in chosen),
        tuple(units.layers[i] for i in chosen),
        units.cost[chosen],
        units.full_cost,
    )
    decision = check_decision(policy.decide(history.of(names), some, episode), policy, some)
    active, reasons = before.active.clone(), list(before.reasons)
    active[chosen] = decision.active
    for i, reason in zip(chosen, decision.reasons, strict=True):
        reasons[i] = reason
    rates = None
    if before.rates is not None or decision.rates is not None:
        rates = torch.ones(len(units), dtype=torch.float64)
        rates = rates if before.rates is None else before.rates.clone()
        rates[chosen] = 1.0 if decision.rates is None else decision.rates
    return Decision(
        active, tuple(reasons), decision.thresholds, units.kinds, rates, decision.measure
    )
