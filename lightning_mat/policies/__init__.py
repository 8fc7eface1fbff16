"""Who trains next: pure functions of the spectra's history, which touch no model and no device."""

from lightning_mat.policies.base import Decision, Policy, UnitTable
from lightning_mat.policies.history import History
from lightning_mat.policies.mat import MAT
from lightning_mat.policies.simple import Full, Random

__all__ = ["MAT", "Decision", "Full", "History", "Policy", "Random", "UnitTable"]
