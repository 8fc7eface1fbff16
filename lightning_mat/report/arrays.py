"""The arrays of a spectra file, read and checked: what comes out of here can be worked with."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT = 1
SERIES = ("lambda_max", "lambda_min", "trace", "effective_rank")
PER_PROBE = ("step", "epoch", "seconds", *SERIES, "active", "reason", "thresholds")

_OTHERS = ("names", "kinds", "layers", "kind_names", "reason_names")
# NumPy's letter for each kind of number: booleans, integers with and without sign, floats, text.
_KINDS = {
    **dict.fromkeys(_OTHERS, "U"),
    **dict.fromkeys(("step", "epoch"), "i"),
    **dict.fromkeys(("seconds", *SERIES, "thresholds"), "f"),
    "active": "b",
    "reason": "u",
}


def load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of a spectra file.

    Args:
        path: The ``.npz``.

    Raises:
        FileNotFoundError: If there is none.
        OSError: If it cannot be read.
        ValueError: If it is damaged, of another version, or something else; nothing else is raised
            for the contents of a file.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"no spectra at {path}: they are written at the first probe, after the warm-up"
        )
    try:
        # What is no archive, NumPy would take for a single array.
        arrays = _read(path) if zipfile.is_zipfile(path) else {}
    except OSError:
        raise
    # Damaged archives raise whatever their readers stumble on: BadZipFile, EOFError, zlib.error.
    except Exception as error:
        raise ValueError(f"{_refusal(path)} ({type(error).__name__}: {error})") from error
    if "format" not in arrays or not np.array_equal(arrays["format"], FORMAT):
        raise ValueError(_refusal(path))
    if wrong := _wrong(arrays):
        raise ValueError(f"{_refusal(path)} ({wrong})")
    return arrays


def load_eigenvalues(path: Path, units: int) -> NDArray[np.float64]:
    """Return the full spectra of one probe, ``[L, S]``.

    Args:
        path: The ``.npy``.
        units: L.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it holds anything else.
    """
    try:
        values = np.load(path, allow_pickle=False)
    except EOFError as error:
        raise ValueError(f"{path} is empty: remove it") from error
    if getattr(values, "dtype", None) != np.float64 or values.ndim != 2 or len(values) != units:
        raise ValueError(f"{path} does not hold the eigenvalues of {units} units: remove it")
    return np.asarray(values)


def _read(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _refusal(path: Path) -> str:
    return (
        f"{path} is not a spectra file of format {FORMAT}: it is damaged, or was written by "
        "another version or by something else; move it away"
    )


def _wrong(arrays: dict[str, NDArray[Any]]) -> str:
    """Return what is wrong with the arrays of a file of this format; nothing if all is well."""
    if missing := [name for name in _KINDS if name not in arrays]:
        return f"without {missing[0]!r}"
    probes, units = arrays["step"].shape[:1], arrays["names"].shape[:1]
    shapes = {
        **dict.fromkeys(_OTHERS[:3], units),
        **{name: arrays[name].shape[:1] for name in _OTHERS[3:]},
        **dict.fromkeys(("step", "epoch", "seconds"), probes),
        **dict.fromkeys((*SERIES, "active", "reason"), probes + units),
        "thresholds": probes + arrays["kind_names"].shape[:1],
    }
    for name, kind in _KINDS.items():
        found = arrays[name]
        if found.dtype.kind != kind or found.shape != shapes[name] or not found.ndim:
            return f"{name!r} is {found.dtype} of shape {found.shape}"
    codes = arrays["reason"]
    if codes.size and codes.max() >= len(arrays["reason_names"]):
        return "'reason' numbers a reason without a name"
    return ""
