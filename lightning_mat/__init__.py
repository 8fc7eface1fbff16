"""Modular adaptive training for PyTorch Lightning: train the units that still learn."""

from lightning_mat import policies
from lightning_mat.callback import MATCallback
from lightning_mat.engine import MAT
from lightning_mat.gate import Gate
from lightning_mat.mntk import Spectra, mntk
from lightning_mat.optim import MATOptimizer
from lightning_mat.units import Partition, Slice, Unit, partition

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
