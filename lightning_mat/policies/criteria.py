r"""Criteria: the number by which units are compared.

============ ======================================================================================
lambda_max   :math:`\lambda_{\max}`, the principal eigenvalue: the paper's
coherence    :math:`\lambda_{\max} / \operatorname{tr} \Theta`, the share of the gradients' energy
             in their common direction, in [1/S, 1]: free of scale
trainability :math:`\lambda_{\max} (u_1^\top r)^2`, the unit's part of the loss reduction by
             equation 3, with r the loss gradient at the outputs; for ``output="loss"``
============ ======================================================================================

Each also per FLOP that training the unit adds to a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mat.policies.base import LAMBDA_MAX, UnitTable
from lightning_mat.policies.history import History

CRITERIA = ("lambda_max", "coherence", "trainability")


def check_criterion(criterion: str) -> None:
    """Raise a ValueError if there is no such criterion."""
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {CRITERIA}, got {criterion!r}")


def criterion_label(criterion: str, per_flop: bool) -> str:
    """Return what people read in the place of a criterion's name.

    Example:
        >>> criterion_label("lambda_max", False), criterion_label("coherence", True)
        ('λ_max', 'coherence per FLOP')
    """
    name = LAMBDA_MAX if criterion == "lambda_max" else criterion
    return f"{name} per FLOP" if per_flop else name


def criterion_values(
    history: History, units: UnitTable, criterion: str = "lambda_max", per_flop: bool = False
) -> Tensor:
    """Return the criterion of every unit at every probe.

    Args:
        history: P probes of the L units.
        units: The units; their costs matter per FLOP only, and are those of now for all probes.
        criterion: One of :data:`CRITERIA`.
        per_flop: Divide by the cost of training the unit. What a unit that costs nothing has is
            Inf, or 0 where its criterion is 0.

    Returns:
        float64, shape ``[P, L]``, ≥ 0, NaN where a probe did not measure a unit.

    Raises:
        ValueError: If there is no such criterion, a probe did not measure what it needs, or no
            unit's cost is known.

    Example:
        >>> from lightning_mat.mntk.spectra import Spectra
        >>> history = History()
        >>> history.append(Spectra(("a", "b"), torch.tensor([[6.0, 2.0], [3.0, 0.0]]),
        ...                        torch.zeros(2)), step=0, epoch=0)
        >>> table = UnitTable(("a", "b"), ("head",) * 2, ("x",) * 2, torch.tensor([4.0, 1.0]))
        >>> criterion_values(history, table, "coherence").tolist()
        [[0.75, 1.0]]
        >>> criterion_values(history, table, "lambda_max", per_flop=True).tolist()
        [[1.5, 3.0]]
    """
    check_criterion(criterion)
    values = history.lambda_max
    if criterion == "coherence":
        values = _shares(values, history.trace)
    elif criterion == "trainability":
        if missing := int((history.alignment.isnan() & ~values.isnan()).any(1).sum()):
            raise ValueError(
                f'criterion="trainability" needs the alignment of every probe, but {missing} of '
                f"{len(history)} did not measure it: begin the run with this criterion and "
                'output="loss"'
            )
        values = values * history.alignment
    return _per_flop(values, units) if per_flop else values


def criterion_floors(
    history: History, units: UnitTable, criterion: str = "lambda_max", per_flop: bool = False
) -> Tensor:
    r"""Return the criterion of every unit's smallest eigenvalue, for the lower end of equation 4.

    :math:`\lambda_{\min}`, its share of the trace, or 0 for trainability, of which that of the
    smallest eigenvalue is not measured and which nothing is below.

    Args:
        history: As in :func:`criterion_values`, which checks them.
        units: As there.
        criterion: As there.
        per_flop: As there.

    Returns:
        float64, shape ``[P, L]``, ≥ 0, NaN where a probe did not measure a unit.
    """
    values = history.lambda_min
    if criterion == "coherence":
        values = _shares(values, history.trace)
    elif criterion == "trainability":
        values = torch.where(values.isnan(), values, 0.0)
    return _per_flop(values, units) if per_flop else values


def _shares(values: Tensor, total: Tensor) -> Tensor:
    """Return values over totals, 0 where the total is."""
    return values / torch.where(total > 0, total, 1.0)


def _per_flop(values: Tensor, units: UnitTable) -> Tensor:
    """Return values over costs."""
    if len(units) and not (units.cost > 0).any():
        raise ValueError(
            "per_flop=True needs the cost of training each unit, and all are 0: take the table "
            "after a probe, which counts them, or pass per_flop=False"
        )
    return torch.where(values > 0, values / units.cost, values)
