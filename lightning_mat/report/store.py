"""SpectraStore: every probe of a run, on the disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lightning_mat.policies.base import LAMBDA_MAX
from lightning_mat.report.arrays import (
    FORMAT,
    PER_PROBE,
    SERIES,
    load_arrays,
    load_eigenvalues,
)
from lightning_mat.report.files import write_whole

if TYPE_CHECKING:
    from lightning_mat.mntk.spectra import Spectra
    from lightning_mat.policies.base import Decision, UnitTable

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Probe:
    """One probe and the decision that was taken from it.

    Args:
        spectra: What was measured, of L units.
        decision: Who trains in the episode that follows.
        units: Names, kinds and layers of the units.
        step: Optimizer steps done when the probe was taken.
        epoch: Epoch in which it was taken.
        seconds: What the probe took, wall clock.
    """

    spectra: Spectra
    decision: Decision
    units: UnitTable
    step: int
    epoch: int
    seconds: float


@dataclass(frozen=True)
class SpectraData:
    """All probes of a run: P probes of L units.

    Attributes:
        names: Names of the units, length L.
        kinds: Kind of each unit, length L.
        layers: Layer of each unit, length L.
        step: Optimizer steps done at each probe, int64 ``[P]``.
        epoch: Epoch of each probe, int64 ``[P]``.
        seconds: Wall-clock seconds of each probe, ``[P]``.
        lambda_max: Principal eigenvalues, ``[P, L]``.
        lambda_min: Smallest eigenvalues, ``[P, L]``.
        trace: Sums of the eigenvalues, ``[P, L]``.
        effective_rank: Effective ranks, ``[P, L]``.
        active: Whether a unit trained in the episode after the probe, bool ``[P, L]``.
        reasons: Why, P tuples of length L.
        thresholds: λ_α of each kind, ``[P]`` each, NaN where the policy had none, or compared units
            by something else than λ_max.
        eigenvalues: All eigenvalues, ``[P, L, S]``, NaN beyond a probe's own S; None if not kept.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    layers: tuple[str, ...]
    step: NDArray[np.int64]
    epoch: NDArray[np.int64]
    seconds: Floats
    lambda_max: Floats
    lambda_min: Floats
    trace: Floats
    effective_rank: Floats
    active: NDArray[np.bool_]
    reasons: tuple[tuple[str, ...], ...]
    thresholds: dict[str, Floats]
    eigenvalues: Floats | None = None

    def by_kind(self) -> dict[str, list[int]]:
        """Return the indices of the units of each kind, in order of first appearance."""
        groups: dict[str, list[int]] = {}
        for i, kind in enumerate(self.kinds):
            groups.setdefault(kind, []).append(i)
        return groups


class SpectraStore:
    """Appends probes to ``spectra.npz``, and reads them back.

    The file is an ordinary ``.npz`` without pickled objects: arrays named as the attributes of
    :class:`SpectraData`, but for ``reason`` (uint16 ``[P, L]``, an index into ``reason_names``) and
    ``thresholds`` (``[P, K]``, columns in the order of ``kind_names``).

    Size: 35 bytes per unit and probe (5 kB a probe for 144 units), written anew at each append,
    aside first, so that the file is whole at every moment. The full spectra are larger (8·S bytes
    per unit, 74 kB a probe for 144 units and 64 samples) and are written once, one file per probe:
    ``spectra.eigenvalues/000012.npy``, float64 ``[L, S]``.

    Args:
        path: Where the file is or will be, e.g. ``<log_dir>/mat/spectra.npz``.
        keep_eigenvalues: Whether to keep the full spectra too.
    """

    def __init__(self, path: str | Path, *, keep_eigenvalues: bool = True) -> None:
        """Name the file; nothing is read or written yet."""
        self.path = Path(path)
        self.keep_eigenvalues = keep_eigenvalues

    def append(self, probe: Probe) -> None:
        """Add a probe.

        Stored probes of the same or a later step are dropped first: a run that was resumed from an
        earlier step, or started anew in the same folder, writes over what it had left behind.

        Args:
            probe: The probe and its decision.

        Raises:
            OSError: If the disk is full or the folder cannot be written; ``filename`` names the
                file, which is then unchanged.
            ValueError: If the units differ from those of the stored probes, or the file is not one
                of this store's.
        """
        stored = _before(load_arrays(self.path), probe.step) if self.path.exists() else None
        row = _arrays_of(probe)
        if stored is not None and len(stored["step"]):
            if any(not np.array_equal(stored[k], row[k]) for k in ("names", "kinds")):
                raise ValueError(
                    f"{self.path} holds probes of other units than this one: give the run a "
                    "folder of its own, or remove the file"
                )
            row = _joined(stored, row)
        count = len(row["step"])
        if self.keep_eigenvalues:
            values = probe.spectra.eigenvalues.detach().cpu().double().numpy()
            write_whole(self._eigenvalues(count - 1), partial(_save_array, values=values))
        write_whole(self.path, partial(_save_arrays, arrays=row))
        self._remove_eigenvalues(count if self.keep_eigenvalues else count - 1)

    def move_aside(self) -> None:
        """Rename the folder of an earlier run's file; call it when a run begins anew.

        ``mat`` becomes ``mat.1``, ``mat.2`` and so on, so that two runs neither mix nor overwrite
        each other.

        Raises:
            OSError: If the folder cannot be renamed.
        """
        if not self.path.exists():
            return
        folder, number = self.path.parent, 1
        while folder.with_name(f"{folder.name}.{number}").exists():
            number += 1
        folder.rename(folder.with_name(f"{folder.name}.{number}"))

    def truncate(self, step: int) -> None:
        """Drop the probes of steps later than ``step``; call it when a run resumes there.

        Args:
            step: Optimizer steps done at the checkpoint.

        Raises:
            OSError: If the folder cannot be written.
            ValueError: If the file is not one of this store's.
        """
        if not self.path.exists():
            return
        stored = load_arrays(self.path)
        kept = _before(stored, step + 1)
        if len(kept["step"]) < len(stored["step"]):
            write_whole(self.path, partial(_save_arrays, arrays=kept))
        self._remove_eigenvalues(len(kept["step"]))

    def read(self) -> SpectraData:
        """Return everything that is stored.

        Raises:
            FileNotFoundError: If there is no file yet.
            ValueError: If the file is not one of this store's.
        """
        arrays = load_arrays(self.path)
        count = len(arrays["step"])
        reason_names = arrays["reason_names"].tolist()
        return SpectraData(
            names=tuple(arrays["names"].tolist()),
            kinds=tuple(arrays["kinds"].tolist()),
            layers=tuple(arrays["layers"].tolist()),
            reasons=tuple(tuple(reason_names[c] for c in row) for row in arrays["reason"].tolist()),
            thresholds={k: arrays["thresholds"][:, j] for j, k in enumerate(arrays["kind_names"])},
            eigenvalues=self._read_eigenvalues(count, len(arrays["names"])),
            **{k: arrays[k] for k in ("step", "epoch", "seconds", *SERIES, "active")},
        )

    def _eigenvalues(self, index: int) -> Path:
        """Return the file of one probe's full spectra."""
        return self.path.with_suffix(".eigenvalues") / f"{index:06d}.npy"

    def _read_eigenvalues(self, count: int, units: int) -> Floats | None:
        """Return all full spectra, [P, L, S], or None where some were not kept."""
        files = [self._eigenvalues(i) for i in range(count)]
        if not files or not all(f.exists() for f in files):
            return None
        spectra = [load_eigenvalues(f, units) for f in files]
        samples = max(s.shape[1] for s in spectra)
        padded = [
            np.pad(s, ((0, 0), (0, samples - s.shape[1])), constant_values=np.nan) for s in spectra
        ]
        return np.stack(padded)

    def _remove_eigenvalues(self, count: int) -> None:
        """Remove the full spectra of all but the first ``count`` probes."""
        for file in self.path.with_suffix(".eigenvalues").glob("*.npy"):
            if file.stem.isdigit() and int(file.stem) >= count:
                file.unlink()


def read(path: str | Path) -> SpectraData:
    """Return everything stored at ``path``; see :meth:`SpectraStore.read`."""
    return SpectraStore(path).read()


def _arrays_of(probe: Probe) -> dict[str, NDArray[Any]]:
    """Return the arrays of a file that holds this probe alone."""
    units, decision = probe.units, probe.decision
    reason_names = list(dict.fromkeys(decision.reasons))
    # Pictures draw them over λ_max.
    thresholds = decision.thresholds if decision.measure == LAMBDA_MAX else {}
    kind_names = list(dict.fromkeys(units.kinds))
    return {
        "format": np.array(FORMAT),
        "names": _strings(units.names),
        "kinds": _strings(units.kinds),
        "layers": _strings(units.layers),
        "kind_names": _strings(kind_names),
        "reason_names": _strings(reason_names),
        "step": np.array([probe.step], dtype=np.int64),
        "epoch": np.array([probe.epoch], dtype=np.int64),
        "seconds": np.array([probe.seconds], dtype=np.float64),
        **{s: getattr(probe.spectra, s).detach().cpu().double().numpy()[None] for s in SERIES},
        "active": decision.active.numpy()[None],
        "reason": np.array([[reason_names.index(r) for r in decision.reasons]], dtype=np.uint16),
        "thresholds": np.array([[thresholds.get(k, np.nan) for k in kind_names]]),
    }


def _joined(stored: dict[str, NDArray[Any]], row: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """Return the arrays of a file that holds the stored probes and the new one."""
    known = [*stored["reason_names"].tolist()]
    known += [r for r in row["reason_names"].tolist() if r not in known]
    codes = np.array([known.index(r) for r in row["reason_names"].tolist()], dtype=np.uint16)
    row = {**row, "reason": codes[row["reason"]], "reason_names": _strings(known)}
    return {**row, **{k: np.concatenate([stored[k], row[k]]) for k in PER_PROBE}}


def _before(arrays: dict[str, NDArray[Any]], step: int) -> dict[str, NDArray[Any]]:
    """Return the arrays without the probes of steps at or after ``step``."""
    count = int(np.searchsorted(arrays["step"], step))
    kept = {k: arrays[k][:count] for k in PER_PROBE}
    # Reasons are numbered as they first appear, so those of later probes are the last ones.
    used = int(kept["reason"].max()) + 1 if count else 0
    return {**arrays, **kept, "reason_names": _strings(arrays["reason_names"][:used].tolist())}


def _strings(values: Sequence[str]) -> NDArray[np.str_]:
    """Return a unicode array, also of nothing."""
    return np.array(list(values), dtype=np.str_)


def _save_arrays(stream: BinaryIO, arrays: dict[str, Any]) -> None:
    np.savez(stream, **arrays)


def _save_array(stream: BinaryIO, values: Floats) -> None:
    np.save(stream, values, allow_pickle=False)
