"""Keeper: writes a run's probes down without ever getting in the way of the run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

from lightning_mat.report.store import Probe, SpectraStore


class Keeper:
    """Writes probes to ``<folder>/mat/spectra.npz``; a full disk costs one warning, not the run.

    Args:
        folder: The run's folder; None for a run that keeps nothing on the disk.
        keep_eigenvalues: Whether to keep the full spectra too.
    """

    def __init__(self, folder: Path | None, *, keep_eigenvalues: bool = True) -> None:
        """Name the file; nothing is read or written yet."""
        self._store: SpectraStore | None = None
        if folder is not None:
            path = folder / "mat" / "spectra.npz"
            self._store = SpectraStore(path, keep_eigenvalues=keep_eigenvalues)

    def begin(self, step: int, probes: int) -> None:
        """Make room for a run that begins, or resumes, at a step; see :class:`SpectraStore`.

        Args:
            step: Optimizer steps done.
            probes: Those of the run so far; there may be one before its first step.
        """
        resumes = step or probes
        self._try(lambda store: store.truncate(step) if resumes else store.move_aside())

    def append(self, probe: Probe) -> None:
        """Add a probe."""
        self._try(lambda store: store.append(probe))

    def _try(self, write: Callable[[SpectraStore], None]) -> None:
        if self._store is None:
            return
        try:
            write(self._store)
        except (OSError, ValueError) as error:
            warnings.warn(
                f"cannot write the spectra to {self._store.path} ({error}): training goes on "
                "without them",
                stacklevel=3,
            )
            self._store = None
