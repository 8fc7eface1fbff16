"""Per-sample gradients of linear layers: torch's, and transformers' transposed ``Conv1D``."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_mat.mntk.factors import Factor, Outer, Summed
from lightning_mat.mntk.rules.base import register_layer_finder, register_layer_rule


@register_layer_rule(nn.Linear)
class LinearRule:
    """y = W x + b: per sample, ∂W = Σ_t grad_t x_tᵀ and ∂b = Σ_t grad_t."""

    def item_dims(self, module: nn.Module) -> tuple[int, int]:
        """Vectors in, vectors out."""
        return 1, 1

    def factors(self, module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Factor]:
        """Return the factors of ``weight`` and ``bias``."""
        return {"weight": Outer(x, grad), "bias": Summed(grad)}


def _is_transposed_linear(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "weight")


@register_layer_finder(_is_transposed_linear)
class TransposedLinearRule(LinearRule):
    """GPT-2's ``Conv1D``, y = Wᵀ x + b with W of shape [in, out]."""

    def factors(self, module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Factor]:
        """Return the factors of ``weight`` and ``bias``."""
        return {"weight": Outer(grad, x), "bias": Summed(grad)}
