"""Spectra and tables for policy tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lightning_mat.mntk.spectra import Spectra
from lightning_mat.policies import History, UnitTable


@dataclass(frozen=True)
class Make:
    """Builds histories and unit tables from plain numbers."""

    @staticmethod
    def spectra(eigenvalues: Sequence[Sequence[float]] | Tensor) -> Spectra:
        """Return spectra of units u0, u1, ... with the eigenvalues, each row descending."""
        values = torch.as_tensor(eigenvalues, dtype=torch.float64)
        names = tuple(f"u{i}" for i in range(len(values)))
        return Spectra(names, values, torch.ones(len(values), dtype=torch.float64))

    def history(self, lambda_max: Sequence[Sequence[float]], lambda_min: float = 0.0) -> History:
        """Return a history with these principal eigenvalues, [P][L], and one smallest one."""
        history = History()
        for t, row in enumerate(lambda_max):
            history.append(self.spectra([[v, min(v, lambda_min)] for v in row]), 10 * t, t)
        return history

    @staticmethod
    def table(
        count: int,
        kinds: str | Sequence[str] = "head",
        layers: str | Sequence[str] = "layer.0",
        cost: Sequence[float] | None = None,
        full_cost: float = 0.0,
    ) -> UnitTable:
        """Return a table of units u0, u1, ...; one string stands for every unit."""
        return UnitTable(
            names=tuple(f"u{i}" for i in range(count)),
            kinds=(kinds,) * count if isinstance(kinds, str) else tuple(kinds),
            layers=(layers,) * count if isinstance(layers, str) else tuple(layers),
            cost=torch.tensor([1.0] * count if cost is None else list(cost), dtype=torch.float64),
            full_cost=full_cost,
        )


@pytest.fixture(scope="session")
def make() -> Make:
    """Return the builder."""
    return Make()
