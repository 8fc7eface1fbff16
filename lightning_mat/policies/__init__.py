"""Who trains next: pure functions of the spectra's history, which touch no model and no device."""

from lightning_mat.policies.base import Decision, Policy, UnitTable
from lightning_mat.policies.criteria import CRITERIA, criterion_values
from lightning_mat.policies.history import History
from lightning_mat.policies.mat import MAT
from lightning_mat.policies.matched import Matched
from lightning_mat.policies.multirate import Multirate
from lightning_mat.policies.ranked import Bottom, Top
from lightning_mat.policies.simple import Full, Random

__all__ = [
    "CRITERIA",
    "MAT",
    "Bottom",
    "Decision",
    "Full",
    "History",
    "Matched",
    "Multirate",
    "Policy",
    "Random",
    "Top",
    "UnitTable",
    "criterion_values",
]
