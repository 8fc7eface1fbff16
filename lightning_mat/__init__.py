"""Modular adaptive training for PyTorch Lightning: train the units that still learn."""

from typing import TYPE_CHECKING, Any

from lightning_mat import policies
from lightning_mat.engine import MAT
from lightning_mat.gate import Gate
from lightning_mat.mntk import Spectra, mntk
from lightning_mat.optim import MATOptimizer
from lightning_mat.units import Partition, Slice, Unit, partition

if TYPE_CHECKING:
    from lightning_mat.callback import MATCallback

__version__ = "0.1.0"

__all__ = [
    "MAT",
    "Gate",
    "MATCallback",
    "MATOptimizer",
    "Partition",
    "Slice",
    "Spectra",
    "Unit",
    "mntk",
    "partition",
    "policies",
]


def __getattr__(name: str) -> Any:
    # Lightning is imported with the callback: the engine, and ``lightning-mat doctor``, work where
    # Lightning or something that it imports is broken.
    if name == "MATCallback":
        from lightning_mat.callback import MATCallback

        return MATCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
