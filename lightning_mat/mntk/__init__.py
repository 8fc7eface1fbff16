"""How trainable a unit is: the spectrum of its modular neural tangent kernel."""

from lightning_mat.mntk.probe import Probe, mntk
from lightning_mat.mntk.rules import register_layer_rule
from lightning_mat.mntk.spectra import Spectra

__all__ = ["Probe", "Spectra", "mntk", "register_layer_rule"]
