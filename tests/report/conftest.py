"""Probes of small made-up runs for report tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lightning_mat import policies
from lightning_mat.mntk.spectra import Spectra
from lightning_mat.policies import History, UnitTable
from lightning_mat.report import Probe, SpectraData, SpectraStore

KINDS = ("head", "head", "ffn", "ffn") * 2
LAYERS = ("net.layer.0",) * 4 + ("net.layer.1",) * 4


def probes(
    count: int, *, policy: policies.Policy | None = None, samples: int = 3
) -> Iterator[Probe]:
    """Yield probes of a run of eight units, in two layers, whose eigenvalues drift apart.

    Those of every other unit stand still from the third probe on.
    """
    policy = policy or policies.MAT(0.2, 0.3)
    names = tuple(f"u{i}" for i in range(len(KINDS)))
    units = UnitTable(names, KINDS, LAYERS, torch.ones(len(KINDS)))
    history = History()
    for t in range(count):
        drift = torch.tensor([t, min(t, 2)] * 4, dtype=torch.float64)
        top = 1e11 * torch.arange(1, 9) ** (1 + drift / 2)
        eigenvalues = top[:, None] * torch.logspace(0, -2, samples, dtype=torch.float64)
        spectra = Spectra(names, eigenvalues, torch.ones(len(names)))
        history.append(spectra, 10 * (t + 1), t)
        decision = policy.decide(history, units, t)
        yield Probe(spectra, decision, units, step=10 * (t + 1), epoch=t, seconds=0.5 + t)


@pytest.fixture(scope="session")
def run() -> Callable[..., list[Probe]]:
    """Return a builder of the probes of a run."""
    return lambda count, **options: list(probes(count, **options))


@pytest.fixture
def stored(run: Callable[..., list[Probe]], tmp_path: Path) -> Callable[..., SpectraData]:
    """Return a builder that stores a run and reads it back."""

    def build(count: int, **options: object) -> SpectraData:
        store = SpectraStore(tmp_path / "run" / "mat" / "spectra.npz")
        for probe in run(count, **options):
            store.append(probe)
        return store.read()

    return build
