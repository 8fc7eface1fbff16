"""An optimizer step that skips what rests."""

from lightning_mat.optim.optimizer import MATOptimizer

__all__ = ["MATOptimizer"]
