"""History: what the probes so far measured."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_mat.mntk.spectra import Spectra

_SERIES = ("lambda_max", "lambda_min", "trace", "effective_rank")
_ALIGNMENT = "alignment"


class History:
    """Scalars of every unit's spectrum at every probe: P probes of L units.

    Eigenvalues are not kept: 40 bytes per unit and probe are, 0.6 MB for a hundred probes of 144
    units. A unit that a probe did not measure is NaN there, in all series.

    Attributes:
        names: Names of the units, length L; empty before the first probe.
        lambda_max: Principal eigenvalues, float64, shape ``[P, L]``.
        lambda_min: Smallest eigenvalues, float64, shape ``[P, L]``.
        trace: Sums of the eigenvalues, float64, shape ``[P, L]``.
        effective_rank: Effective ranks, float64, shape ``[P, L]``.
        alignment: (u₁ᵀr)², float64, shape ``[P, L]``, NaN for probes that did not measure it.
        step: Optimizer steps done when each probe was taken, length P.
        epoch: Epoch in which each probe was taken, length P.

    Example:
        >>> from lightning_mat.mntk.spectra import Spectra
        >>> history = History()
        >>> history.append(Spectra(("a", "b"), torch.tensor([[4.0, 1.0], [9.0, 0.0]]),
        ...                        torch.zeros(2)), step=100, epoch=1)
        >>> len(history), history.lambda_max[-1].tolist()
        (1, [4.0, 9.0])
    """

    def __init__(self) -> None:
        """Start without a probe."""
        self.names: tuple[str, ...] = ()
        self.lambda_max: Tensor = torch.zeros(0, 0, dtype=torch.float64)
        self.lambda_min: Tensor = torch.zeros(0, 0, dtype=torch.float64)
        self.trace: Tensor = torch.zeros(0, 0, dtype=torch.float64)
        self.effective_rank: Tensor = torch.zeros(0, 0, dtype=torch.float64)
        self.alignment: Tensor = torch.zeros(0, 0, dtype=torch.float64)
        self.step: list[int] = []
        self.epoch: list[int] = []

    def __len__(self) -> int:
        """Return the number of probes, P."""
        return len(self.step)

    def append(self, spectra: Spectra, step: int, epoch: int, *, gaps: bool = False) -> None:
        """Add a probe.

        Args:
            spectra: The probe, of the units that earlier probes measured.
            step: Optimizer steps done so far.
            epoch: The current epoch.
            gaps: Whether units with an eigenvalue that is NaN or Inf are noted as not measured (NaN
                in all series) instead of refused.

        Raises:
            ValueError: If the units differ from those of the earlier probes, or an eigenvalue is
                NaN or Inf and ``gaps`` is False. The history is then unchanged.
        """
        names = tuple(spectra.names)
        if len(self):
            _check_names(self.names, names)
        found = {s: getattr(spectra, s) for s in _SERIES}
        if spectra.alignment is not None:
            found[_ALIGNMENT] = spectra.alignment
        lost = ~spectra.finite if gaps else torch.zeros(len(names), dtype=torch.bool)
        rows = {
            series: _row(values.masked_fill(lost, 0.0), names, series).masked_fill(lost, torch.nan)
            for series, values in found.items()
        }
        rows.setdefault(_ALIGNMENT, torch.full((len(names),), torch.nan, dtype=torch.float64))
        for series, row in rows.items():
            before = getattr(self, series) if len(self) else row.new_zeros(0, len(names))
            setattr(self, series, torch.cat([before, row[None]]))
        self.names = names
        self.step.append(int(step))
        self.epoch.append(int(epoch))

    def of(self, names: Sequence[str], new: Collection[str] = ()) -> History:
        """Return the history of the units of these names.

        Args:
            names: In the order of the units to come. Those that the history does not know were
                measured by no probe: they are NaN.
            new: Those of them that are NaN although the history knows a unit of this name.

        Example:
            >>> from lightning_mat.mntk.spectra import Spectra
            >>> history = History()
            >>> history.append(Spectra(("a", "b"), torch.tensor([[4.0], [9.0]]), torch.zeros(2)),
            ...                step=100, epoch=1)
            >>> history.of(["b", "c"]).lambda_max.tolist()
            [[9.0, nan]]
        """
        column = {name: i for i, name in enumerate(self.names) if name not in new}
        known = [i for i, name in enumerate(names) if name in column]
        source = [column[names[i]] for i in known]
        other = History()
        other.names = tuple(names) if len(self) else ()
        other.step, other.epoch = list(self.step), list(self.epoch)
        for series in (*_SERIES, _ALIGNMENT):
            values = torch.full((len(self), len(other.names)), torch.nan, dtype=torch.float64)
            if len(self):
                values[:, known] = getattr(self, series)[:, source]
            setattr(other, series, values)
        return other

    def check_against(self, names: Sequence[str]) -> None:
        """Check that a decision about these units can be taken from the newest probe.

        Raises:
            ValueError: If there is no probe, the units differ, or the newest probe holds NaN or
                Inf.
        """
        if not len(self):
            raise ValueError("the history is empty: probe once before deciding by spectra")
        _check_names(self.names, tuple(names))
        for series in ("lambda_max", "lambda_min"):
            _row(getattr(self, series)[-1], self.names, series)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain types; loads under ``torch.load(weights_only=True)``."""
        return {
            "names": list(self.names),
            **{series: getattr(self, series).clone() for series in (*_SERIES, _ALIGNMENT)},
            "step": list(self.step),
            "epoch": list(self.epoch),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become the history that :meth:`state_dict` described.

        Raises:
            ValueError: If its parts do not fit together. The history is then unchanged.
        """
        names, step, epoch = state["names"], state["step"], state["epoch"]
        series_of = {series: state[series] for series in _SERIES}
        # States of earlier versions do not have it.
        missing = torch.full_like(state["lambda_max"], torch.nan)
        series_of[_ALIGNMENT] = state.get(_ALIGNMENT, missing)
        shapes = {series: tuple(values.shape) for series, values in series_of.items()}
        if len(step) != len(epoch) or set(shapes.values()) != {(len(step), len(names))}:
            raise ValueError(
                f"a history of {len(step)} steps, {len(epoch)} epochs and {len(names)} units "
                f"cannot hold series of shapes {shapes}: the state is damaged"
            )
        for series, values in series_of.items():
            setattr(self, series, values.to(device="cpu", dtype=torch.float64).clone())
        self.names = tuple(names)
        self.step = [int(s) for s in step]
        self.epoch = [int(e) for e in epoch]


def _row(values: Tensor, names: tuple[str, ...], series: str) -> Tensor:
    """Return one probe's values as float64 on the CPU, checked."""
    row = values.detach().to(device="cpu", dtype=torch.float64).clone()
    if tuple(row.shape) != (len(names),):
        raise ValueError(
            f"{series} has shape {tuple(row.shape)} for {len(names)} units: a probe needs one "
            "value per unit"
        )
    if not row.isfinite().all():
        failed = [n for n, ok in zip(names, row.isfinite().tolist(), strict=True) if not ok]
        raise ValueError(
            f"{series} is NaN or Inf for {len(failed)} of {len(names)} units, first "
            f"{failed[0]!r}: leave this probe out and keep the previous decision"
        )
    return row


def _check_names(expected: tuple[str, ...], found: tuple[str, ...]) -> None:
    """Raise if the units are not the same, in the same order."""
    if expected == found:
        return
    if len(expected) != len(found):
        raise ValueError(
            f"the history is of {len(expected)} units, got {len(found)}: use the same partition "
            "throughout a run, or start a new history"
        )
    i = next(i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b)
    raise ValueError(
        f"unit {i} of the history is {expected[i]!r}, got {found[i]!r}: use the same partition "
        "throughout a run, or start a new history"
    )
