"""SharedProbe: one probe by several processes, each of which measures a share of the units."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mat.mntk.probe import Probe
from lightning_mat.mntk.spectra import Spectra
from lightning_mat.parallel.ranks import Ranks
from lightning_mat.parallel.shares import share_out
from lightning_mat.parallel.whole import Whole
from lightning_mat.units.core import Partition


class SharedProbe:
    """Measures spectra as :class:`~lightning_mat.mntk.probe.Probe` does, on all ranks together.

    Every rank runs the same samples through its copy of the model and makes the Grams of its share
    of the units; what the others measure is neither hooked nor kept. Then all have all eigenvalues:
    the same bits everywhere. One unit's numbers come from one rank.

    Who measures what follows from the partition and the number of ranks, from the second probe on
    also from the costs that the first one counted, which are part of :meth:`state_dict`: so a
    resumed run shares out as the one that was stopped.

    Every rank has the whole of a model that ``fully_shard`` cut while it is measured, see
    :class:`~lightning_mat.parallel.whole.Whole`.

    Args:
        model: This rank's copy, not what DDP wraps around it.
        part: The units.
        ranks: The processes.
        settings: Those of :class:`~lightning_mat.mntk.probe.Probe`.

    Attributes:
        step_samples: Samples of a training step on this device.

    Raises:
        ValueError: As ``Probe``.
    """

    def __init__(self, model: nn.Module, part: Partition, ranks: Ranks, **settings: Any) -> None:
        Probe(model, part, **settings)  # what is wrong, all find at once
        self.model, self.part, self.ranks = model, part, ranks
        self._whole = Whole(model, ranks)
        self.step_samples: int | None = settings.pop("step_samples", None)
        self._settings = settings
        self._cost: Tensor | None = None
        self._probe: tuple[list[int], Probe | None] | None = None

    def measure(self, batch: Any) -> Spectra:
        """Return the spectra of all units over the samples, which are the same on all ranks.

        Raises:
            ValueError: As ``Probe``, on the rank that measures.
            RuntimeError: Likewise, and where another rank failed.
        """
        with (
            self.ranks.same_buffers(self.model),
            self._whole.there(),
            self.ranks.together("the probe"),
        ):
            units, probe = self._own()
            own = None
            if probe is not None:
                probe.step_samples = self.step_samples
                own = probe.measure(batch)
        samples = self.ranks.of_all(0 if own is None else own.eigenvalues.shape[1])
        spectra = self._gather(units, own, max(samples))
        if self._cost is None:
            self._cost = spectra.cost
            self._probe = None
        return spectra

    def prepare(self, batch: Any) -> None:
        """Look at the model, to find early what cannot be measured.

        Raises:
            ValueError: As ``Probe``, on the rank that would measure.
            RuntimeError: On the others.
        """
        with (
            self.ranks.same_buffers(self.model),
            self._whole.there(),
            self.ranks.together("preparing the probe"),
        ):
            _, probe = self._own()
            if probe is not None:
                probe.prepare(batch)

    @property
    def settled(self) -> bool:
        """Whether who measures what stays, because costs were counted."""
        return self._cost is not None

    def state_dict(self) -> dict[str, Any]:
        """Return what decides who measures what."""
        return {"cost": None if self._cost is None else self._cost.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Share out as the run that :meth:`state_dict` is of."""
        cost = state.get("cost")
        self._cost = None if cost is None else cost.clone()
        self._probe = None

    def _own(self) -> tuple[list[int], Probe | None]:
        """Return the units that this rank measures, and with what; None for no unit."""
        if self._probe is None:
            units = share_out(self.part, self._cost, self.ranks.size)[self.ranks.rank]
            probe = None
            if units:
                probe = Probe(self.model, some_of(self.part, units), **self._settings)
            self._probe = units, probe
        return self._probe

    def _gather(self, units: list[int], own: Spectra | None, samples: int) -> Spectra:
        """Return everyone's spectra: each row is zero on all ranks but one, so sums are exact."""
        table = torch.zeros(len(self.part), samples + 2, dtype=torch.float64)
        if own is not None:
            rows = torch.tensor(units)
            table[rows, :samples] = own.eigenvalues
            table[rows, samples] = own.cost
            if own.alignment is not None:
                table[rows, samples + 1] = own.alignment
        table = self.ranks.sum(table)
        alignment = table[:, samples + 1].clone() if self._settings.get("alignment") else None
        return Spectra(
            self.part.names,
            table[:, :samples].clone(),
            table[:, samples].clone(),
            alignment=alignment,
        )


def some_of(part: Partition, units: Sequence[int]) -> Partition:
    """Return some units of a partition as one of its own, in which the others are unowned.

    The model is not asked again: what was frozen when the units were found may have changed since.
    """
    number = {unit: i for i, unit in enumerate(units)}
    some = copy.copy(part)
    some.units = tuple(part.units[i] for i in units)
    owned = {
        name: tuple(sorted((number[i], rect) for i, rect in owners if i in number))
        for name, owners in part.owners.items()
    }
    some.owners = {name: owners for name, owners in owned.items() if owners}
    return some
